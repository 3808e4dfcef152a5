"""The critic of latent adversarial distillation (LADD, arXiv 2403.12015): small heads on the features of a frozen transformer."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax.kernels.dense.api import dense
from sana_jax.models.layers import LAYERS
from sana_jax.models.placement import gathered, over_batch
from sana_jax.models.remat import recomputed

# Names of the parameters' axes, by path; see `parallel.sharding`.
LOGICAL_AXES = {
    "*/logit/*": None,
    "*/kernel": (None, None, "embed"),
    "*/scale": None,
    "*/bias": None,
}
NEIGHBOURHOOD = 9  # tokens that the second convolution of a head sees
POWER_ITERATIONS = 8


class LatentCritic(nn.Module):
    """A logit of every token by every head: positive means "real"."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "K B N C"]) -> Float[Array, "K B N"]:
        """`features`: for each of K heads the outputs of a block."""
        heads = nn.scan(CriticHead, variable_axes={"params": 0}, split_rngs={"params": True})
        return heads(self.dtype, name=LAYERS)(None, features)[1]


class CriticHead(nn.Module):
    """Convolutions over the row of tokens, of which the second has a shortcut.

    GroupNorm in place of the original's norm over eight pictures, which would tie pictures of a batch together.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, carry: None, x: Float[Array, "B N C"]) -> tuple[None, Float[Array, "B N"]]:
        channels = x.shape[-1]

        def layer(x, neighbourhood, name):
            x = SpectralConv(channels, neighbourhood, self.dtype, name=name)(x)
            size = math.gcd(channels, 32)
            x = nn.GroupNorm(num_groups=None, group_size=size, dtype=self.dtype, name=f"{name}_norm")(x)
            return nn.leaky_relu(x, 0.2)

        x = layer(over_batch(x).astype(self.dtype), 1, "each")
        x = (x + layer(x, NEIGHBOURHOOD, "along")) * 0.5**0.5
        return carry, SpectralConv(1, 1, self.dtype, name="logit")(x)[..., 0].astype(jnp.float32)


class SpectralConv(nn.Module):
    """Convolution over a circle of tokens, its kernel divided by its largest singular value (arXiv 1802.05957).

    It is a product with the tokens' neighbourhoods side by side, put together again for the derivative: XLA's TPU compiler takes
    half a minute for such a convolution, and CPUs run it slowly within a scan.
    """

    features: int
    neighbourhood: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N D"]:
        shape = (self.neighbourhood * x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = gathered((kernel / largest_singular_value(kernel)).astype(self.dtype))
        side = self.neighbourhood // 2

        @recomputed
        def convolve(x, kernel, bias):
            return dense(
                jnp.concatenate([jnp.roll(x, -i, axis=1) for i in range(-side, side + 1)], axis=-1), kernel, bias
            )

        return convolve(x, kernel, bias)


def largest_singular_value(matrix: Float[Array, "C D"]) -> Float[Array, ""]:
    """By power iteration from a vector that is always the same, so that nothing has to be carried from step to step.

    It comes out a few percent too small where the largest values are close to each other. Its derivative is that of
    u M v with constant u and v.
    """
    constant = jax.lax.stop_gradient(matrix)
    v = jnp.cos(jnp.arange(matrix.shape[1], dtype=jnp.float32) ** 2)  # as good as random

    def normalised(x):
        return x / (jnp.linalg.norm(x) + 1e-12)

    for _ in range(POWER_ITERATIONS):
        u = normalised(constant @ v)
        v = normalised(u @ constant)
    return u @ matrix @ v
