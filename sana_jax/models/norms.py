"""Root-mean-square normalisation with the derivative that is fast on every backend."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.kernels.dense.api import sum_positions
from sana_jax.kernels.derivatives import custom_vjp


def rms_normalise(x: Float[Array, "*B C"], epsilon: float) -> Float[Array, "*B C"]:
    r"""$x / \sqrt{\mathrm{mean}_c(x^2) + \epsilon}$ in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


@custom_vjp
def scale_channels(x: Float[Array, "*B C"], scale: Float[Array, "C"]) -> Float[Array, "*B C"]:
    """x * scale, with `sum_positions` as the derivative of the scale."""
    return x * scale


def _forward(x, scale):
    return x * scale, (x, scale)


def _backward(residuals, g):
    x, scale = residuals
    return g * scale, sum_positions(g * x).astype(scale.dtype)


scale_channels.defvjp(_forward, _backward)


class RMSNorm(nn.Module):
    """Learned scale on `rms_normalise`; with `zero_centred` the factor is 1 + scale, as Gemma stores it."""

    epsilon: float = 1e-6
    zero_centred: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        init = nn.initializers.zeros if self.zero_centred else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],)).astype(jnp.float32)
        y = rms_normalise(x, self.epsilon)
        return scale_channels(y, 1 + scale if self.zero_centred else scale).astype(x.dtype)
