"""Feed-forward layers of the diffusion transformer. They see the tokens as an image grid [B, H, W, C]."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.kernels.activations import gelu
from sana_jax.models.dense import Dense
from sana_jax.models.gated_depthwise import gated_depthwise
from sana_jax.models.placement import gathered


def conv_default_init(fan_in: int):
    """PyTorch's default for convolutions, weights and biases alike: uniform in +-1/sqrt(fan_in)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


class MixFFN(nn.Module):
    """1x1 expansion - SiLU - depthwise 3x3 - gate - 1x1 projection (GLUMBConv, SANA section 2.2).

    The 3x3 convolution is also the only source of position information in models without a position table.
    """

    hidden: int  # width after the gate; the expansion is twice that
    dtype: jnp.dtype = jnp.float32
    seq_axis: str | None = None
    implementation: str | None = None  # of what is between the 1x1 convolutions

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        width = x.shape[-1]
        init = conv_default_init(width)
        expand = Dense(2 * self.hidden, kernel_init=init, bias_init=init, dtype=self.dtype, parts=2, name="expand")
        y = GatedDepthwise(self.seq_axis, self.implementation, name="depthwise")(*expand(x))
        init = conv_default_init(self.hidden)
        return Dense(width, use_bias=False, kernel_init=init, dtype=self.dtype, name="project")(y)


class GatedDepthwise(nn.Module):
    """Owns the depthwise kernel and bias of `gated_depthwise`."""

    seq_axis: str | None = None
    implementation: str | None = None

    @nn.compact
    def __call__(self, value: Float[Array, "B H W C"], gate: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = 2 * value.shape[-1]
        kernel = gathered(self.param("kernel", conv_default_init(9), (3, 3, channels)))
        bias = self.param("bias", conv_default_init(9), (channels,))
        return gated_depthwise(value, gate, kernel, bias, self.seq_axis, self.implementation)


class GeluMLP(nn.Module):
    """The plain transformer feed-forward layer (ablation: no gate, no convolution)."""

    hidden: int
    dtype: jnp.dtype = jnp.float32
    seq_axis: str | None = None  # as MixFFN's; every token is on its own
    implementation: None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        y = Dense(self.hidden, dtype=self.dtype, name="expand")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="project")(gelu(y))
