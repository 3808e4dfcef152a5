r"""DC-AE in horizontal strips: a picture of any size in the memory of a small one, with the numbers of the plain call.

Three things to do with what lies between two whole grids, each in a `lax.scan` over windows of rows; a window is a strip
and the rows around it that its result depends on (its halo):

* the fine stages, which are 3x3 convolutions, per-pixel norms and shortcuts without parameters: a strip goes through all of
  them at once, from the finest grid that has attention (an eighth of the resolution in the public models) to the picture;
* an EfficientViT block of the coarse stages: linear attention reads the whole grid, but only through its state, a sum over
  pixels. One scan adds up the states of the strips, another reads the sum and goes through the rest of the block;
* the rest of the coarse stages, whole: a ResBlock and an Up or Down block there hold no more than a few grids.

Why this is exact. Let N be the rows of a strip's result, and go backwards: before a convolution the rows that matter
are N and one more on either side, before an Up or Down block those of the other grid. What is not inside the picture is
dropped from N, not kept as zeros: the plain call pads every convolution's input, not the picture, and a row outside would
not stay zero from one layer to the next. All windows of a layer have the length of the largest N and are pushed
inwards until they lie inside the picture. Then for each row of N its neighbour is in the window and right by induction,
or is outside the picture, and there the window ends too, so that the convolution's own padding is the plain call's. Rows
of the window outside N may be wrong; none of N reads them, and they are cut off. No mask, and one program for all strips.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from sana_jax.kernels.linear_attention.api import LinearAttentionState
from sana_jax.models.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    check_picture,
    decoder_head,
    decoder_stage,
    decoder_stem,
    decoder_up,
    encoder_down,
    encoder_head,
    encoder_stage,
    encoder_stem,
    make_block,
)
from sana_jax.models.autoencoder_blocks import LiteMLAState

LARGEST_PLAIN = 2048 * 2048  # pixels of a picture up to which `choose_strips` says 1
STRIP_PIXELS = 1024 * 1024  # of a strip beyond, so that it takes the memory of a 1024x1024 picture
COARSE = 3  # without attention, the first stage whose grid is held whole: an eighth of the resolution


def decode_in_strips(
    autoencoder: Autoencoder, params: dict, latents: Float[Array, "B h w C"], strips: int
) -> Float[Array, "B H W 3"]:
    """`autoencoder.decode` in `strips` strips of equal height.

    Where the height is not a multiple, the last strip begins earlier and computes some rows a second time. A grid with
    fewer rows than `strips` has a strip per row.

    Args:
      params: of the whole autoencoder, as for `apply`.
      latents: unscaled, as for `decode`.
      strips: 1 to the rows of the finest grid with attention (an eighth of the picture's in the public models).

    Raises:
      ValueError: the number of strips is outside that range, or the decoder has attention at full resolution.
    """
    config, params = autoencoder.config, params["decoder"]
    split = _split(config, "decoder")
    rows, firsts = _cut(latents.shape[1] * config.downsample_factor // 2**split, strips)

    x = _Part(config, decoder_stem).apply({"params": params}, latents)
    for stage in reversed(range(split, len(config.decoder_block_out_channels))):
        x = _Part(config, functools.partial(decoder_up, stage=stage)).apply({"params": params}, x)
        x = _blocks_in_strips(config, "decoder", stage, params, x, strips)

    batch, height, width, _ = x.shape
    scale = 2**split
    fine = _FineDecoder(config, split, rows)

    def add_strip(picture, first):
        strip = fine.apply({"params": params}, x, first)
        return jax.lax.dynamic_update_slice_in_dim(picture, strip, scale * first, axis=1), None

    picture = jnp.zeros((batch, scale * height, scale * width, config.in_channels), jnp.float32)
    return jax.lax.scan(add_strip, picture, firsts)[0]


def encode_in_strips(
    autoencoder: Autoencoder, params: dict, images: Float[Array, "B H W 3"], strips: int
) -> Float[Array, "B h w C"]:
    """`autoencoder.encode` in strips; see `decode_in_strips`.

    Raises:
      ValueError: as `encode` and `decode_in_strips`.
    """
    config, params = autoencoder.config, params["encoder"]
    batch, height, width = images.shape[:3]
    check_picture(config, height, width)
    split = _split(config, "encoder")
    height, width = height // 2**split, width // 2**split
    rows, firsts = _cut(height, strips)
    fine = _FineEncoder(config, split, rows)

    def add_strip(grid, first):
        strip = fine.apply({"params": params}, images, first)
        return jax.lax.dynamic_update_slice_in_dim(grid, strip, first, axis=1), None

    channels = config.encoder_block_out_channels[split]
    x = jax.lax.scan(add_strip, jnp.zeros((batch, height, width, channels), config.dtype), firsts)[0]
    for stage in range(split, len(config.encoder_block_out_channels)):
        x = _blocks_in_strips(config, "encoder", stage, params, x, strips)
        x = _Part(config, functools.partial(encoder_down, stage=stage)).apply({"params": params}, x)
    return _Part(config, encoder_head).apply({"params": params}, x)


def choose_strips(config: AutoencoderConfig, height: int, width: int, side: str = "decoder") -> int:
    """Strips for a picture of height x width pixels: 1 up to 2048x2048, above that one per 1024x1024 pixels.

    Also 1 for a `side` ("decoder" or "encoder") with attention at full resolution, which cannot be cut.
    """
    if height * width <= LARGEST_PLAIN or 0 in _attention_stages(config, side):
        return 1
    return min(math.ceil(height * width / STRIP_PIXELS), height // 2 ** _split(config, side))


def check_strips(config: AutoencoderConfig, height: int, strips: int) -> None:
    """Raises ValueError where a picture of `height` pixels cannot be decoded in that many strips."""
    if strips != 1:
        _cut(height // 2 ** _split(config, "decoder"), strips)


def _attention_stages(config: AutoencoderConfig, side: str) -> list[int]:
    types, layers = getattr(config, f"{side}_block_types"), getattr(config, f"{side}_layers_per_block")
    return [i for i, (kind, count) in enumerate(zip(types, layers, strict=True)) if count and kind != "ResBlock"]


def _split(config: AutoencoderConfig, side: str) -> int:
    """The finest stage with attention; its grid is held whole, and fine strips are cut from it or joined to it."""
    attention = _attention_stages(config, side)
    if 0 in attention:
        raise ValueError(
            f"the {side} has attention at full resolution ({side}_block_types[0]='EfficientViTBlock'), which reads the "
            f"whole picture: it cannot run in strips. Use the plain call, or split it over devices "
            "(sana_jax.parallel.autoencoder)."
        )
    return min(attention, default=min(COARSE, len(config.encoder_block_out_channels) - 1))


def _cut(height: int, strips: int) -> tuple[int, Int[Array, " S"]]:
    """Rows of a strip, and the first row of each, on the grid of `height` rows from which the strips are cut."""
    if not 1 <= strips <= height:
        raise ValueError(
            f"strips={strips}: the grid on which the fine stages are cut has {height} rows here; use 1 to {height}."
        )
    rows = math.ceil(height / strips)
    return rows, jnp.minimum(jnp.arange(0, height, rows), height - rows)


class _Part(nn.Module):
    """One of the functions that `Encoder` and `Decoder` consist of, with the parameters that these have."""

    config: AutoencoderConfig
    part: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return self.part(self.config, x)


def _blocks_in_strips(
    config: AutoencoderConfig, side: str, stage: int, params: dict, x: Float[Array, "B H W C"], strips: int
) -> Float[Array, "B H W C"]:
    """A stage's blocks, those with attention in strips."""
    for index in range(getattr(config, f"{side}_layers_per_block")[stage]):
        block = make_block(config, side, stage, index)
        if getattr(config, f"{side}_block_types")[stage] == "ResBlock":
            x = block.apply({"params": params[block.name]}, x)
        else:
            x = _attention_block_in_strips(block, params[block.name], x, min(strips, x.shape[1]))
    return x


def _attention_block_in_strips(
    block: nn.Module, params: dict, x: Float[Array, "B H W C"], strips: int
) -> Float[Array, "B H W C"]:
    """An EfficientViTBlock: first the attention's state, strip by strip, then all that follows from it."""
    batch, height, _, channels = x.shape
    rows, firsts = _cut(height, strips)
    whole = _Window(0, height)
    reach = _scale_reach(block.scales)
    attention = LiteMLAState(block.head_dim, block.scales, dtype=block.dtype)

    def add_state(state, begin):
        # `begin` is where a strip would begin if the last did not overlap the one before: each row is counted once.
        window = _window(jnp.minimum(begin, height - rows), rows, reach, height)
        row = window.start + jnp.arange(window.length)
        counted = (row >= begin) & (row < begin + rows)
        more = attention.apply({"params": params["attention"]}, _crop(x, whole, window), counted)
        return jax.tree.map(jnp.add, state, more), None

    heads, d = channels * (1 + len(block.scales)) // block.head_dim, block.head_dim
    state = LinearAttentionState(jnp.zeros((batch, heads, d, d)), jnp.zeros((batch, heads, d)))
    state = jax.lax.scan(add_state, state, jnp.arange(0, height, rows))[0]

    def add_strip(grid, first):
        window = _window(first, rows, reach + 1, height)  # the feed-forward's convolution is 3x3
        strip = _crop(block.apply({"params": params}, _crop(x, whole, window), state), window, _Window(first, rows))
        return jax.lax.dynamic_update_slice_in_dim(grid, strip, first, axis=1), None

    return jax.lax.scan(add_strip, jnp.zeros_like(x), firsts)[0]


def _scale_reach(scales: tuple[int, ...]) -> int:
    """Rows on either side that a pixel's q, k and v depend on."""
    return max(scales, default=1) // 2


class _Step(NamedTuple):
    """A part of the fine stages and what it has to read."""

    stage: int | None  # None: the encoder's stem, the decoder's head
    level: int  # of the grid at its entry: 2^level picture pixels per grid pixel
    halo: int  # rows at its entry on either side of the strip's own


def _decoder_steps(config: AutoencoderConfig, split: int) -> list[_Step]:
    """The decoder after stage `split`, in order; halos counted back from the picture."""
    layers = config.decoder_layers_per_block

    def before_up(halo):
        # Convolution on the fine grid, before that the grid doubles; or on the coarse one, and then it doubles.
        return (halo + 1 + 1) // 2 if config.upsample_block_type == "interpolate" else (halo + 1) // 2 + 1

    halo = 1 if layers[0] else before_up(0)
    steps = [_Step(None, 0 if layers[0] else 1, halo)]
    for stage in range(split):
        if layers[stage]:
            halo = before_up(halo + 2 * layers[stage])  # two convolutions to a ResBlock
            steps.append(_Step(stage, stage + 1, halo))
    return steps[::-1]


def _encoder_steps(config: AutoencoderConfig, split: int) -> list[_Step]:
    """The encoder before stage `split`, in order; halos counted back from that stage's grid.

    Before a Down block they are even, so that windows begin at a multiple of two and pair the rows as the plain call.
    """
    layers = config.encoder_layers_per_block
    rows, steps = 0, []
    for stage in reversed(range(split)):
        if layers[stage]:
            rows = 2 * rows + 1 + 2 * layers[stage]  # the Down block's convolution, two to a ResBlock
            steps.append(_Step(stage, stage, rows + rows % 2))
    steps.append(_Step(None, 0, rows + 1 if layers[0] else 2 * rows + 2))
    return steps[::-1]


class _Window(NamedTuple):
    """Rows [start, start + length) of a grid."""

    start: Int[Array, ""] | int
    length: int


def _window(first, rows: int, halo: int, height: int) -> _Window:
    """A strip's rows with `halo` more on either side, pushed inside a grid of `height` rows."""
    length = min(rows + 2 * halo, height)
    return _Window(jnp.clip(first - halo, 0, height - length), length)


def _crop(x: Float[Array, "B H W C"], held: _Window, wanted: _Window) -> Float[Array, "B h W C"]:
    """The wanted rows of a grid of which x is the held ones."""
    return jax.lax.dynamic_slice_in_dim(x, wanted.start - held.start, wanted.length, axis=1)


class _FineDecoder(nn.Module):
    """The whole grid after stage `split` to the picture's strip that belongs to `rows` grid rows from `first` on."""

    config: AutoencoderConfig
    split: int
    rows: int

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], first: Int[Array, ""]) -> Float[Array, "B H W D"]:
        height, held = x.shape[1], _Window(0, x.shape[1])

        def window(level, halo):
            scale = 2 ** (self.split - level)
            return _window(scale * first, scale * self.rows, halo, scale * height)

        for stage, level, halo in _decoder_steps(self.config, self.split):
            entry = window(level, halo)
            x = _crop(x, held, entry)
            x = decoder_head(self.config, x) if stage is None else decoder_stage(self.config, x, stage)
            scale = x.shape[1] // entry.length
            held = _Window(scale * entry.start, x.shape[1])
        return _crop(x, held, window(0, 0))


class _FineEncoder(nn.Module):
    """A picture to `rows` rows, from `first` on, of the grid before stage `split`."""

    config: AutoencoderConfig
    split: int
    rows: int

    @nn.compact
    def __call__(self, images: Float[Array, "B H W D"], first: Int[Array, ""]) -> Float[Array, "B h w C"]:
        height, held = images.shape[1], _Window(0, images.shape[1])

        def window(level, halo):
            scale = 2 ** (self.split - level)
            return _window(scale * first, scale * self.rows, halo, height // 2**level)

        x = images
        for stage, level, halo in _encoder_steps(self.config, self.split):
            entry = window(level, halo)
            x = _crop(x, held, entry)
            x = encoder_stem(self.config, x) if stage is None else encoder_stage(self.config, x, stage)
            scale = entry.length // x.shape[1]
            held = _Window(entry.start // scale, x.shape[1])
        return _crop(x, held, window(self.split, 0))
