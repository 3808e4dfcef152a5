"""Feed-forward layers of the diffusion transformer. They see the tokens as an image grid [B, H, W, C]."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.kernels.glu_mbconv.api import gated_depthwise
from sana_jax.models.dense import Dense
from sana_jax.models.placement import gathered
from sana_jax.models.row_split import with_neighbour_rows


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

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        width = x.shape[-1]
        init = conv_default_init(width)
        y = Dense(2 * self.hidden, kernel_init=init, bias_init=init, dtype=self.dtype, name="expand")(x)
        y = GatedDepthwise(self.seq_axis, name="depthwise")(y)
        init = conv_default_init(self.hidden)
        return Dense(width, use_bias=False, kernel_init=init, dtype=self.dtype, name="project")(y)


class GatedDepthwise(nn.Module):
    """Owns the depthwise kernel and bias of `gated_depthwise`."""

    seq_axis: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C2"]) -> Float[Array, "B H W C"]:
        kernel = gathered(self.param("kernel", conv_default_init(9), (3, 3, x.shape[-1])))
        bias = self.param("bias", conv_default_init(9), (x.shape[-1],))
        if self.seq_axis is None:
            return gated_depthwise(x, kernel, bias)
        # Zero rows outside the picture stay zero under SiLU, so that they are the convolution's own padding.
        return gated_depthwise(with_neighbour_rows(x, self.seq_axis), kernel, bias, row_padding=0)


class GeluMLP(nn.Module):
    """The plain transformer feed-forward layer (ablation: no gate, no convolution)."""

    hidden: int
    dtype: jnp.dtype = jnp.float32
    seq_axis: str | None = None  # as MixFFN's; every token is on its own

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        y = Dense(self.hidden, dtype=self.dtype, name="expand")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="project")(jax.nn.gelu(y))
