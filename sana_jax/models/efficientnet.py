"""EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excite): ImageNet features for the judge and the perceptual loss.

The Lite family keeps EfficientNet-B0's stages and drops what integer hardware dislikes: ReLU6 instead of swish, no
squeeze-and-excite. Batch normalisation is folded into the convolutions when the weights are read, so that what is left is
convolution, bias, ReLU6. Padding is TensorFlow's "SAME" (at stride 2 and an even size the extra pixel is on the right).
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.kernels.depthwise_conv.api import depthwise_conv


class Stage(NamedTuple):
    """A run of inverted-bottleneck blocks; only the first has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
NUM_CLASSES = 1000
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class Output(NamedTuple):
    """What the network sees in a picture.

    Attributes:
      maps: one feature map per stage, at 1/2, 1/4, 1/8, 1/16, 1/16, 1/32, 1/32 of the picture's side.
      pooled: the 1280 features before the classifier, averaged over the picture.
      logits: scores of the 1,000 ImageNet classes.
    """

    maps: list[Float[Array, "B H W C"]]
    pooled: Float[Array, "B 1280"]
    logits: Float[Array, "B 1000"]


class DepthwiseConv(nn.Module):
    """Depthwise convolution with TensorFlow's "SAME" padding."""

    kernel: int
    stride: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        shape = (self.kernel, self.kernel, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2), shape)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        out = depthwise_conv(x.astype(self.dtype), kernel.astype(self.dtype), bias.astype(self.dtype))
        # Strided "SAME" is the dense result at every second position, from 1 where the side is even and from 0 where odd.
        if self.stride == 2:
            out = out[:, 1 - x.shape[1] % 2 :: 2, 1 - x.shape[2] % 2 :: 2]
        return out


class InvertedBottleneck(nn.Module):
    """Expand (1x1), filter each channel (depthwise), project (1x1, linear); a residual where the shape is kept."""

    channels: int
    kernel: int
    stride: int
    expansion: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        y = x
        if self.expansion > 1:
            y = nn.relu6(nn.Dense(self.expansion * x.shape[-1], dtype=self.dtype, name="expand")(y))
        y = nn.relu6(DepthwiseConv(self.kernel, self.stride, dtype=self.dtype, name="depthwise")(y))
        y = nn.Dense(self.channels, dtype=self.dtype, name="project")(y)
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for pictures in -1..1 of any size from 32; trained at 224.

    The public network takes (x - 127) / 128 with x in 0..255; a picture p in -1..1 has x = 127.5 (p + 1), which makes
    (127.5 p + 0.5) / 128.
    """

    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Output:
        x = (127.5 * images + 0.5) / 128
        x = nn.relu6(nn.Conv(STEM_CHANNELS, (3, 3), strides=2, padding="SAME", dtype=self.dtype, name="stem")(x))
        maps = []
        index = 0
        for stage in STAGES:
            for repeat in range(stage.blocks):
                x = InvertedBottleneck(
                    channels=stage.channels,
                    kernel=stage.kernel,
                    stride=stage.stride if repeat == 0 else 1,
                    expansion=stage.expansion,
                    dtype=self.dtype,
                    name=f"block_{index}",
                )(x)
                index += 1
            maps.append(x)
        head = nn.relu6(nn.Dense(HEAD_CHANNELS, dtype=self.dtype, name="head")(x))
        pooled = head.astype(jnp.float32).mean((1, 2))
        return Output(maps, pooled, nn.Dense(NUM_CLASSES, name="classifier")(pooled))


def features(
    params, images: Float[Array, "B H W 3"], dtype: jnp.dtype = jnp.dtype("float32")
) -> list[Float[Array, "B h w c"]]:
    """Feature maps of the seven stages, finest first, for a perceptual loss.

    Args:
      params: parameters of `EfficientNetLite0`, as `weights.efficientnet.load` gives them.
      images: pictures in -1..1.
      dtype: compute dtype.
    """
    return EfficientNetLite0(dtype=dtype).apply({"params": params}, images).maps
