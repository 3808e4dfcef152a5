"""Building blocks of DC-AE (Chen et al. 2024, "Deep Compression Autoencoder"), NHWC.

Two families: ResBlock where the grid is fine, EfficientViT block (linear attention, then a gated convolution) where it
is coarse; between stages Down and Up blocks whose shortcut has no parameters, so that a factor of 32 or more stays
trainable. Names follow the public checkpoints' roles; `sana_jax.weights.autoencoder` maps them.

With `seq_axis` a module works on some rows of its grid, inside `jax.shard_map` (`row_split`, `parallel.autoencoder`).
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from sana_jax.kernels.activations import silu
from sana_jax.kernels.dense.api import dense_parts
from sana_jax.kernels.linear_attention.api import LinearAttentionState
from sana_jax.models.autoencoder_conv import conv2d
from sana_jax.models.dense import Dense
from sana_jax.models.gated_depthwise import gated_depthwise
from sana_jax.models.linear_attention import attend_linearly, attention_state, read_state
from sana_jax.models.multiscale import further_scale
from sana_jax.models.placement import gathered, over_batch
from sana_jax.models.remat import PRODUCT, checkpoint_name
from sana_jax.models.row_split import with_neighbour_rows

ACTIVATIONS = {"relu": nn.relu, "silu": silu}
NORM_EPS = 1e-5
ATTENTION_EPS = 1e-15


def pixel_unshuffle(x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
    """Moves 2x2 patches into channels in PyTorch's order: channel c, sub-pixel (i, j) -> channel 4 c + 2 i + j."""
    return rearrange(x, "b (h i) (w j) c -> b h w (c i j)", i=2, j=2)


def pixel_shuffle(x: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
    """Inverse of `pixel_unshuffle`."""
    return rearrange(x, "b h w (c i j) -> b (h i) (w j) c", i=2, j=2)


def average_channels(x: Float[Array, "*S C"], channels: int) -> Float[Array, "*S D"]:
    """Shortcut to fewer channels: the mean of consecutive groups of C / channels channels."""
    return reduce(x, "... (d g) -> ... d", "mean", d=channels)


def duplicate_channels(x: Float[Array, "*S C"], channels: int) -> Float[Array, "*S D"]:
    """Shortcut to more channels: each one repeated channels / C times in a row."""
    return repeat(x, "... c -> ... (c r)", r=channels // x.shape[-1])


def upsample_nearest(x: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
    """Every pixel becomes 2x2 equal ones."""
    return repeat(x, "b h w c -> b (h i) (w j) c", i=2, j=2)


class Conv(nn.Module):
    """3x3 convolution with one pixel of zero padding on every side (PyTorch's padding=1, also at stride 2)."""

    features: int
    stride: int = 1
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    seq_axis: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.features))
        x, kernel = over_batch(x.astype(self.dtype)), gathered(kernel.astype(self.dtype))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        if self.seq_axis is None:
            out = conv2d(x, kernel, bias, self.stride)
        else:
            # With stride 2 every result is centred on an even row, which is never a device's last.
            x = with_neighbour_rows(x, self.seq_axis, above=1, below=1 if self.stride == 1 else 0)
            out = conv2d(x, kernel, bias, self.stride, row_padding=0)
        return checkpoint_name(out, PRODUCT)


class RMSNorm2d(nn.Module):
    r"""$x / \sqrt{\mathrm{mean}_c(x^2) + \epsilon} \cdot w + b$ at every pixel, computed in fp32.

    At the end of a residual branch w starts at zero (`ends_branch`), so that an untrained block passes its input on: the
    small autoencoder of the emoji set reaches 18.6 dB instead of 18.1 after 400 steps of 4 pictures.
    """

    ends_branch: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        init = nn.initializers.zeros if self.ends_branch else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)
        return (x * scale + bias).astype(self.dtype)


class FrozenBatchNorm(nn.Module):
    """BatchNorm as it stands at inference: the running statistics are parameters that no gradient reaches.

    The in- and mix-1.0 decoders were trained with it; new models use RMSNorm2d.
    """

    ends_branch: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        shape = (x.shape[-1],)
        init = nn.initializers.zeros if self.ends_branch else nn.initializers.ones
        scale = self.param("scale", init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = jax.lax.stop_gradient(self.param("mean", nn.initializers.zeros, shape))
        var = jax.lax.stop_gradient(self.param("var", nn.initializers.ones, shape))
        weight = scale * jax.lax.rsqrt(var + NORM_EPS)
        return (x.astype(jnp.float32) * weight + (bias - mean * weight)).astype(self.dtype)


NORMS = {"rms_norm": RMSNorm2d, "batch_norm": FrozenBatchNorm}


class ResBlock(nn.Module):
    """Two convolutions, norm last, nothing after the sum."""

    norm: str = "rms_norm"
    activation: str = "silu"
    dtype: jnp.dtype = jnp.float32
    seq_axis: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        conv = functools.partial(Conv, x.shape[-1], dtype=self.dtype, seq_axis=self.seq_axis)
        y = ACTIVATIONS[self.activation](conv(name="conv1")(x))
        y = conv(use_bias=False, name="conv2")(y)
        return x + NORMS[self.norm](ends_branch=True, dtype=self.dtype, name="norm")(y)


class HeadwiseProjection(nn.Module):
    """q, k and v, each [B, H, W, C], of a kernel whose columns are a head's q, k and v, then those of the next head."""

    head_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B H W C"], ...]:
        shape = (x.shape[-1], 3 * x.shape[-1])
        kernel = gathered(self.param("kernel", nn.initializers.xavier_uniform(), shape).astype(self.dtype))
        kernel = rearrange(kernel, "c (n three d) -> c three (n d)", three=3, d=self.head_dim)
        return checkpoint_name(dense_parts(x.astype(self.dtype), kernel), PRODUCT)


class MultiScaleProjection(nn.Module):
    """A further scale of q, k and v: depthwise convolution, then a 1x1 convolution within each group of channels.

    The parameters are in the order of `HeadwiseProjection`.
    """

    kernel_size: int
    head_dim: int
    dtype: jnp.dtype = jnp.float32
    seq_axis: str | None = None

    @nn.compact
    def __call__(self, qkv: tuple[Float[Array, "B H W C"], ...]) -> tuple[Float[Array, "B H W C"], ...]:
        channels, size = 3 * qkv[0].shape[-1], self.head_dim
        init = functools.partial(nn.initializers.variance_scaling, 1.0, "fan_in", "truncated_normal")
        depth = self.param("depth", init(in_axis=(0, 1), out_axis=2), (self.kernel_size, self.kernel_size, channels))
        group_shape = (channels // size, size, size)
        group = self.param("group", init(in_axis=1, out_axis=2, batch_axis=(0,)), group_shape)
        depth = rearrange(depth.astype(self.dtype), "a b (n three d) -> three a b (n d)", three=3, d=size)
        group = rearrange(group.astype(self.dtype), "(n three) i o -> three n i o", three=3)
        return further_scale(qkv, depth, group, self.seq_axis)


class LiteMLA(nn.Module):
    """Multi-scale ReLU linear attention over all pixels (EfficientViT, section 3.1).

    Every scale has heads of its own. A head does not take its q, k and v from the thirds of the fused projection, but from
    3 head_dim consecutive channels: public weights have this order. The weights are put into that of the thirds before they
    are used, so that no activation has to be. For grids of at most head_dim pixels diffusers multiplies in another order; the
    result is the same, and so is the place of eps.
    """

    head_dim: int = 32
    scales: tuple[int, ...] = ()
    norm: str = "rms_norm"
    dtype: jnp.dtype = jnp.float32
    seq_axis: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], state: LinearAttentionState | None = None
    ) -> Float[Array, "B H W C"]:
        """`state`: of a larger grid of which x is some rows (`LiteMLAState`); None: that of x, summed over `seq_axis`."""
        scales = self._project(x)
        if state is None:
            options = {"head_dim": self.head_dim, "eps": ATTENTION_EPS, "seq_axis": self.seq_axis}
            outs = [attend_linearly(*qkv, stacked=scale == 0, **options) for scale, qkv in enumerate(scales)]
        else:
            each = zip(scales, _of_scales(state, scales), strict=True)
            outs = [read_state(q, state, eps=ATTENTION_EPS) for (q, *_), state in each]
        out = jnp.concatenate(outs, axis=-1)
        out = rearrange(out.astype(self.dtype), "b (h w) c -> b h w c", h=x.shape[1])
        out = Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="out")(out)
        return NORMS[self.norm](ends_branch=True, dtype=self.dtype, name="norm")(out)

    def _project(self, x):
        """Of every scale q, k and v, each [B, N, C]."""
        qkv = HeadwiseProjection(self.head_dim, self.dtype, name="qkv")(x)
        scaled = [
            MultiScaleProjection(size, self.head_dim, self.dtype, self.seq_axis, name=f"scale_{i}")(qkv)
            for i, size in enumerate(self.scales)
        ]
        return [[rearrange(x, "b h w c -> b (h w) c") for x in scale] for scale in (qkv, *scaled)]


class LiteMLAState(LiteMLA):
    """What some rows of a grid add to the state that its pixels attend to; parameters of `LiteMLA`."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], counted: Bool[Array, " H"]) -> LinearAttentionState:
        """The state of the `counted` rows; the others only feed the convolutions of the scales."""
        counted = jnp.repeat(counted, x.shape[2])[:, None]
        states = [attention_state(jnp.where(counted, k, 0), v, head_dim=self.head_dim) for _, k, v in self._project(x)]
        return jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), *states)


def _of_scales(state: LinearAttentionState, scales: list) -> list[LinearAttentionState]:
    """The heads of every scale."""
    states = jax.tree.map(lambda x: jnp.split(x, len(scales), axis=1), state)
    return [LinearAttentionState(*each) for each in zip(*states, strict=True)]


class GLUMBConv(nn.Module):
    """Gated inverted bottleneck: 1x1 to 8C, SiLU, depthwise 3x3, value times SiLU(gate), 1x1 to C, RMSNorm2d."""

    expansion: int = 4
    dtype: jnp.dtype = jnp.float32
    seq_axis: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels, wide = x.shape[-1], 2 * self.expansion * x.shape[-1]
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=2)
        kernel = self.param("depth_kernel", init, (3, 3, wide))
        bias = self.param("depth_bias", nn.initializers.zeros, (wide,))
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        value, gate = Dense(wide, dtype=self.dtype, parts=2, name="inverted")(x)
        y = gated_depthwise(value, gate, kernel, bias, self.seq_axis)
        y = Dense(channels, use_bias=False, dtype=self.dtype, name="point")(y)
        return RMSNorm2d(ends_branch=True, dtype=self.dtype, name="norm")(y)


class EfficientViTBlock(nn.Module):
    """Linear attention, then a gated convolution, each with its residual."""

    head_dim: int = 32
    scales: tuple[int, ...] = ()
    norm: str = "rms_norm"
    dtype: jnp.dtype = jnp.float32
    seq_axis: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], state: LinearAttentionState | None = None
    ) -> Float[Array, "B H W C"]:
        """`state`: as for `LiteMLA`."""
        attend = LiteMLA(self.head_dim, self.scales, self.norm, self.dtype, self.seq_axis, name="attention")
        x = x + checkpoint_name(attend(x, state), "attention")
        feed_forward = GLUMBConv(dtype=self.dtype, seq_axis=self.seq_axis, name="feed_forward")
        return x + checkpoint_name(feed_forward(x), "feed_forward")


class DownBlock(nn.Module):
    """Halves the grid; the shortcut is the unshuffled input, averaged over consecutive channels."""

    features: int
    unshuffle: bool = True  # convolution, then pixel_unshuffle; else a stride-2 convolution
    shortcut: bool = True
    dtype: jnp.dtype = jnp.float32
    seq_axis: str | None = None  # a device has an even number of rows

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        conv = functools.partial(Conv, dtype=self.dtype, seq_axis=self.seq_axis, name="conv")
        y = pixel_unshuffle(conv(self.features // 4)(x)) if self.unshuffle else conv(self.features, stride=2)(x)
        if not self.shortcut:
            return y
        return y + average_channels(pixel_unshuffle(x), self.features).astype(self.dtype)


class UpBlock(nn.Module):
    """Doubles the grid; the shortcut is the input with every channel duplicated, then shuffled."""

    features: int
    interpolate: bool = False  # nearest neighbour, then convolution; else convolution, then pixel_shuffle
    shortcut: bool = True
    dtype: jnp.dtype = jnp.float32
    seq_axis: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
        conv = functools.partial(Conv, dtype=self.dtype, seq_axis=self.seq_axis, name="conv")
        y = conv(self.features)(upsample_nearest(x)) if self.interpolate else pixel_shuffle(conv(4 * self.features)(x))
        if not self.shortcut:
            return y
        return y + pixel_shuffle(duplicate_channels(x, 4 * self.features)).astype(self.dtype)
