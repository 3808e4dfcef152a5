"""DC-AE: the deep-compression autoencoder whose latents SANA diffuses.

Deterministic (no posterior), pictures in -1..1, one latent pixel per 2^(stages - 1) picture pixels.
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.models.autoencoder_blocks import (
    ACTIVATIONS,
    NORMS,
    Conv,
    DownBlock,
    EfficientViTBlock,
    ResBlock,
    RMSNorm2d,
    UpBlock,
    average_channels,
    duplicate_channels,
)
from sana_jax.models.remat import check_remat, remat
from sana_jax.models.sizes import check_numbers

BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")
REMAT_NAMES = ("attention", "feed_forward")  # of the EfficientViT blocks


# Names of the parameters' axes, by path; see `parallel.sharding`.
LOGICAL_AXES = {
    "*/qkv/kernel": ("embed", "channels"),
    "*/attention/out/kernel": ("channels", "embed"),
    "*/scale_*/depth": (None, None, "channels"),
    "*/scale_*/group": ("channels", None, None),
    "*/inverted/kernel": ("embed", "channels"),
    "*/depth_kernel": (None, None, "channels"),
    "*/depth_bias": None,
    "*/point/kernel": ("channels", "embed"),
    "*/kernel": (None, None, "channels", "embed"),
    "*/scale": None,
    "*/bias": None,
    "*/mean": None,
    "*/var": None,
}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of a DC-AE; the fields are those of diffusers' AutoencoderDC, defaults included, then ours.

    Per-stage fields run from the finest grid to the coarsest. A stage 0 without blocks does not exist: a Down block
    brings the picture to half resolution at once, and the decoder ends in an Up block. One name in place of a tuple of
    block types, norms or activations holds for every stage.

    Attributes:
      encoder_qkv_multiscales, decoder_qkv_multiscales: kernel sizes of further attention scales, per stage.
      downsample_block_type: "pixel_unshuffle", or "conv" (stride 2).
      upsample_block_type: "pixel_shuffle", or "interpolate" (nearest, then convolution).
      scaling_factor: latents times this have about unit variance; `encode` and `decode` leave it to the caller.
      dtype: of activations; parameters are fp32. Norm statistics and attention sums are always fp32.
      remat: what the backward pass computes again per block, "none" to "full"; see `models.remat`.

    Raises:
      ValueError: for a combination that no model can have.
    """

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] | str = "ResBlock"
    decoder_block_types: tuple[str, ...] | str = "ResBlock"
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: tuple[str, ...] | str = "rms_norm"
    decoder_act_fns: tuple[str, ...] | str = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 1.0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        stages = len(self.encoder_block_out_channels)
        for side in ("encoder", "decoder"):
            self._to_tuple(f"{side}_block_types", stages)
            for name in ("block_out_channels", "layers_per_block"):
                self._to_tuple(f"{side}_{name}", stages)
            scales = f"{side}_qkv_multiscales"
            object.__setattr__(self, scales, tuple(tuple(s) for s in getattr(self, scales)))
            self._to_tuple(scales, stages)
            self._check_stages(side)
        check_numbers(
            self, counts=("in_channels", "latent_channels", "attention_head_dim"), factors=("scaling_factor",)
        )
        self._to_tuple("decoder_norm_types", stages)
        self._to_tuple("decoder_act_fns", stages)
        self._check_names()
        check_remat(self.remat, REMAT_NAMES)
        for side in ("encoder", "decoder"):
            self._check_widths(side)

    @property
    def downsample_factor(self) -> int:
        """Picture pixels per latent pixel, along one side."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    def _to_tuple(self, name: str, stages: int):
        value = getattr(self, name)
        value = (value,) * stages if isinstance(value, str) else tuple(value)
        if len(value) != stages:
            raise ValueError(
                f"{name} has {len(value)} entries, encoder_block_out_channels has {stages}: give one entry per stage "
                "(encoder and decoder have the same stages)."
            )
        object.__setattr__(self, name, value)

    def _check_stages(self, side: str):
        check_numbers(self, counts=(f"{side}_block_out_channels",), factors=())
        layers, scales = f"{side}_layers_per_block", f"{side}_qkv_multiscales"
        if any(count < 0 for count in getattr(self, layers)):
            raise ValueError(f"{layers}={getattr(self, layers)} must be at least 0 in every stage.")
        if any(kernel < 1 or kernel % 2 == 0 for kernels in getattr(self, scales) for kernel in kernels):
            raise ValueError(f"{scales}={getattr(self, scales)} must have odd kernel sizes of at least 1.")

    def _check_names(self):
        allowed = {
            "encoder_block_types": BLOCK_TYPES,
            "decoder_block_types": BLOCK_TYPES,
            "decoder_norm_types": tuple(NORMS),
            "decoder_act_fns": tuple(ACTIVATIONS),
            "decoder_conv_act_fn": tuple(ACTIVATIONS),
            "downsample_block_type": ("pixel_unshuffle", "conv"),
            "upsample_block_type": ("pixel_shuffle", "interpolate"),
            "dtype": ("float32", "bfloat16", "float16"),
        }
        for field, names in allowed.items():
            value = getattr(self, field)
            for name in (value,) if isinstance(value, str) else value:
                if name not in names:
                    raise ValueError(f"{field} has {name!r}, which is not one of {', '.join(names)}.")

    def _check_widths(self, side: str):
        widths, layers, types = (
            getattr(self, f"{side}_{name}") for name in ("block_out_channels", "layers_per_block", "block_types")
        )
        for stage, (width, count, kind) in enumerate(zip(widths, layers, types, strict=True)):
            where = f"{side} stage {stage}"
            if count == 0 and 0 < stage < len(widths) - 1:
                raise ValueError(
                    f"{where} has 0 blocks: only the first stage (joined with the next) and the last may be empty; "
                    f"set {side}_layers_per_block[{stage}] to at least 1."
                )
            if kind == "EfficientViTBlock" and width % self.attention_head_dim:
                raise ValueError(
                    f"{where} has width {width}, not a multiple of attention_head_dim={self.attention_head_dim}; "
                    f"use {width // self.attention_head_dim * self.attention_head_dim or self.attention_head_dim}."
                )
            if stage and self.downsample_block_type == "pixel_unshuffle" and side == "encoder" and width % 4:
                raise ValueError(f"{where} has width {width}: pixel_unshuffle needs a multiple of 4.")
            skipped = stage and layers[stage - 1] == 0  # no block leads here from the stage before
            if stage and not skipped and ((4 * widths[stage - 1]) % width or width > 4 * widths[stage - 1]):
                raise ValueError(
                    f"{where} has width {width}, the stage before {widths[stage - 1]}: the shortcut between them needs "
                    f"4 x {widths[stage - 1]} to be a multiple of {width}."
                )
        shortcut = self.encoder_out_shortcut if side == "encoder" else self.decoder_in_shortcut
        if shortcut and widths[-1] % self.latent_channels:
            raise ValueError(
                f"{side} width {widths[-1]} next to the latent is not a multiple of latent_channels="
                f"{self.latent_channels}; change one, or switch off the shortcut there."
            )


def check_picture(config: AutoencoderConfig, height: int, width: int) -> None:
    """Raises ValueError for a picture that the encoder's factor does not divide."""
    factor = config.downsample_factor
    if height % factor or width % factor:
        raise ValueError(
            f"picture {height}x{width}: both sides must be multiples of {factor}; crop or resize to "
            f"{max(1, height // factor) * factor}x{max(1, width // factor) * factor}."
        )


# The parts of which encoder and decoder consist. They make submodules of the compact method that calls them, so that
# whoever runs only some of them (`autoencoder_strips`) has the same parameters under the same names. `seq_axis`: mesh axis
# over which the rows of the picture are split; see `row_split`.


def make_block(config: AutoencoderConfig, side: str, stage: int, index: int, seq_axis: str | None = None) -> nn.Module:
    """Block `index` of a stage, ResBlock or EfficientViTBlock. The encoder has a single norm and activation throughout."""
    decoder = side == "decoder"
    norm = config.decoder_norm_types[stage] if decoder else "rms_norm"
    shared = dict(norm=norm, dtype=jnp.dtype(config.dtype), seq_axis=seq_axis, name=f"stage_{stage}_block_{index}")
    kind = {"ResBlock": ResBlock, "EfficientViTBlock": EfficientViTBlock}[getattr(config, f"{side}_block_types")[stage]]
    kind = remat(kind, config.remat, REMAT_NAMES, scanned=False)
    if getattr(config, f"{side}_block_types")[stage] == "ResBlock":
        activation = config.decoder_act_fns[stage] if decoder else "silu"
        return kind(activation=activation, **shared)
    scales = getattr(config, f"{side}_qkv_multiscales")[stage]
    return kind(head_dim=config.attention_head_dim, scales=scales, **shared)


def encoder_stem(
    config: AutoencoderConfig, images: Float[Array, "B H W C"], seq_axis: str | None = None
) -> Float[Array, "B h w D"]:
    """Pictures to the first stage that has blocks: stage 0, or stage 1 at half resolution."""
    widths, dtype = config.encoder_block_out_channels, jnp.dtype(config.dtype)
    shared = dict(dtype=dtype, seq_axis=seq_axis, name="conv_in")
    if config.encoder_layers_per_block[0]:
        return Conv(widths[0], **shared)(images.astype(dtype))
    unshuffle = config.downsample_block_type == "pixel_unshuffle"
    return DownBlock(widths[1], unshuffle, shortcut=False, **shared)(images.astype(dtype))


def encoder_stage(
    config: AutoencoderConfig, x: Float[Array, "B H W C"], stage: int, seq_axis: str | None = None
) -> Float[Array, "B h w D"]:
    """A stage's blocks, then the way to the next stage."""
    for i in range(config.encoder_layers_per_block[stage]):
        x = make_block(config, "encoder", stage, i, seq_axis)(x)
    return encoder_down(config, x, stage, seq_axis)


def encoder_down(
    config: AutoencoderConfig, x: Float[Array, "B H W C"], stage: int, seq_axis: str | None = None
) -> Float[Array, "B h w D"]:
    """From a stage to the next; nothing after the last stage and after one without blocks."""
    widths = config.encoder_block_out_channels
    if not config.encoder_layers_per_block[stage] or stage + 1 == len(widths):
        return x
    unshuffle, dtype = config.downsample_block_type == "pixel_unshuffle", jnp.dtype(config.dtype)
    return DownBlock(widths[stage + 1], unshuffle, dtype=dtype, seq_axis=seq_axis, name=f"stage_{stage}_down")(x)


def encoder_head(
    config: AutoencoderConfig, x: Float[Array, "B h w D"], seq_axis: str | None = None
) -> Float[Array, "B h w C"]:
    """The coarsest stage to latents."""
    conv = Conv(config.latent_channels, dtype=jnp.dtype(config.dtype), seq_axis=seq_axis, name="conv_out")
    latents = conv(x)
    if config.encoder_out_shortcut:
        latents = latents + average_channels(x, config.latent_channels)
    return latents.astype(jnp.float32)


def decoder_stem(
    config: AutoencoderConfig, latents: Float[Array, "B h w C"], seq_axis: str | None = None
) -> Float[Array, "B h w D"]:
    """Latents to the coarsest stage."""
    width, dtype = config.decoder_block_out_channels[-1], jnp.dtype(config.dtype)
    latents = latents.astype(dtype)
    x = Conv(width, dtype=dtype, seq_axis=seq_axis, name="conv_in")(latents)
    return x + duplicate_channels(latents, width) if config.decoder_in_shortcut else x


def decoder_stage(
    config: AutoencoderConfig, x: Float[Array, "B h w C"], stage: int, seq_axis: str | None = None
) -> Float[Array, "B H W D"]:
    """The way from the coarser stage, then a stage's blocks."""
    x = decoder_up(config, x, stage, seq_axis)
    for i in range(config.decoder_layers_per_block[stage]):
        x = make_block(config, "decoder", stage, i, seq_axis)(x)
    return x


def decoder_up(
    config: AutoencoderConfig, x: Float[Array, "B h w C"], stage: int, seq_axis: str | None = None
) -> Float[Array, "B H W D"]:
    """From the coarser stage to this one; nothing before the coarsest and before one without blocks."""
    widths = config.decoder_block_out_channels
    if not config.decoder_layers_per_block[stage] or stage + 1 == len(widths):
        return x
    interpolate, dtype = config.upsample_block_type == "interpolate", jnp.dtype(config.dtype)
    return UpBlock(widths[stage], interpolate, dtype=dtype, seq_axis=seq_axis, name=f"stage_{stage}_up")(x)


def decoder_head(
    config: AutoencoderConfig, x: Float[Array, "B h w D"], seq_axis: str | None = None
) -> Float[Array, "B H W C"]:
    """The finest stage that has blocks (0, or 1 at half resolution) to pictures."""
    dtype = jnp.dtype(config.dtype)
    x = ACTIVATIONS[config.decoder_conv_act_fn](RMSNorm2d(dtype=dtype, name="norm_out")(x))
    shared = dict(dtype=dtype, seq_axis=seq_axis, name="conv_out")
    if config.decoder_layers_per_block[0]:
        x = Conv(config.in_channels, **shared)(x)
    else:
        x = UpBlock(config.in_channels, config.upsample_block_type == "interpolate", shortcut=False, **shared)(x)
    return x.astype(jnp.float32)


class Encoder(nn.Module):
    """Pictures to unscaled latents."""

    config: AutoencoderConfig
    seq_axis: str | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        x = encoder_stem(self.config, images, self.seq_axis)
        for stage in range(len(self.config.encoder_block_out_channels)):
            x = encoder_stage(self.config, x, stage, self.seq_axis)
        return encoder_head(self.config, x, self.seq_axis)


class Decoder(nn.Module):
    """Unscaled latents to pictures."""

    config: AutoencoderConfig
    seq_axis: str | None = None

    @nn.compact
    def __call__(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        x = decoder_stem(self.config, latents, self.seq_axis)
        for stage in reversed(range(len(self.config.decoder_block_out_channels))):
            x = decoder_stage(self.config, x, stage, self.seq_axis)
        return decoder_head(self.config, x, self.seq_axis)


class Autoencoder(nn.Module):
    """DC-AE. `encode` gives unscaled latents: times `config.scaling_factor` to diffuse, divided by it before `decode`.

    With `seq_axis` the calls work on some rows of the picture, inside `jax.shard_map` (`parallel.autoencoder`).
    """

    config: AutoencoderConfig
    seq_axis: str | None = None

    def setup(self):
        self.encoder = Encoder(self.config, self.seq_axis)
        self.decoder = Decoder(self.config, self.seq_axis)

    def encode(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        """Pictures in -1..1 to latents on a grid `config.downsample_factor` times coarser, fp32.

        Raises:
          ValueError: where a side of the picture is not a multiple of the factor.
        """
        check_picture(self.config, *images.shape[1:3])
        return self.encoder(images)

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Unscaled latents to pictures, fp32, about -1..1 (not clipped)."""
        return self.decoder(latents)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """The reconstruction."""
        return self.decode(self.encode(images))
