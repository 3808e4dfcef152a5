"""DC-AE in overlapping square tiles, each coded alone and blended at its borders: diffusers' `AutoencoderDC.enable_tiling`.

For comparison with diffusers only. Attention then sees one tile in place of the picture, and a convolution zeros in place of
what is around the tile, so that the result is another one than the plain call's. `autoencoder_strips` saves memory with the
plain call's numbers.
"""

import collections
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.models.autoencoder import Autoencoder, AutoencoderConfig, check_picture

Tiles = tuple[int, int]  # side of a tile and distance between the beginnings of two, in picture pixels
DIFFUSERS_TILES: Tiles = (512, 448)  # what `enable_tiling()` takes


def decode_in_tiles(
    autoencoder: Autoencoder, params: dict, latents: Float[Array, "B h w C"], tiles: Tiles = DIFFUSERS_TILES
) -> Float[Array, "B H W 3"]:
    """What `decode` of an AutoencoderDC with tiling gives; the plain call's result where one tile covers the picture.

    Args:
      params: of the whole autoencoder, as for `apply`.
      latents: unscaled, as for `decode`.
      tiles: side and distance, multiples of the autoencoder's factor; the distance is at most the side.

    Raises:
      ValueError: tiles that are none.
    """
    check_tiles(autoencoder.config, tiles)
    decode = functools.partial(autoencoder.apply, {"params": params}, method="decode")
    return _in_tiles(decode, latents, _of_latents(autoencoder.config, tiles), tiles)


def encode_in_tiles(
    autoencoder: Autoencoder, params: dict, images: Float[Array, "B H W 3"], tiles: Tiles = DIFFUSERS_TILES
) -> Float[Array, "B h w C"]:
    """What `encode` of an AutoencoderDC with tiling gives; see `decode_in_tiles`.

    Raises:
      ValueError: as `encode` and `decode_in_tiles`.
    """
    check_picture(autoencoder.config, *images.shape[1:3])
    check_tiles(autoencoder.config, tiles)
    encode = functools.partial(autoencoder.apply, {"params": params}, method="encode")
    return _in_tiles(encode, images, tiles, _of_latents(autoencoder.config, tiles))


def check_tiles(config: AutoencoderConfig, tiles: Tiles) -> None:
    """Raises ValueError for tiles that this autoencoder cannot have."""
    side, stride = tiles
    factor = config.downsample_factor
    if side % factor or stride % factor or not 0 < stride <= side:
        raise ValueError(
            f"tiles={tuple(tiles)}: give (side, distance) in pixels, multiples of {factor}, the distance at most the "
            f"side; diffusers takes {DIFFUSERS_TILES}."
        )


def _of_latents(config: AutoencoderConfig, tiles: Tiles) -> Tiles:
    """The same tiles on the latents' grid."""
    side, stride = tiles
    return side // config.downsample_factor, stride // config.downsample_factor


def _in_tiles(code: Callable, x: Float[Array, "B H W C"], tiles: Tiles, tiles_out: Tiles) -> Float[Array, "B h w D"]:
    """`code` of every tile of x, blended; `tiles_out` are the tiles on the grid of the result."""
    (side, _), (side_out, stride_out) = tiles, tiles_out
    if max(x.shape[1:3]) <= side:
        return code(x)
    coded = _map_tiles(code, x, tiles)
    overlap = side_out - stride_out
    for i, j in coded:  # row by row: what is above and what is left is blended already, as in diffusers
        if i:
            coded[i, j] = _blend(coded[i - 1, j], coded[i, j], overlap, axis=1)
        if j:
            coded[i, j] = _blend(coded[i, j - 1], coded[i, j], overlap, axis=2)
    rows = itertools.groupby(coded, key=lambda place: place[0])
    rows = [jnp.concatenate([coded[place][:, :stride_out, :stride_out] for place in row], axis=2) for _, row in rows]
    return jnp.concatenate(rows, axis=1)


def _map_tiles(code: Callable, x: Float[Array, "B H W C"], tiles: Tiles) -> dict[tuple[int, int], Float[Array, "..."]]:
    """(row, column) of a tile -> `code` of it, row by row; tiles of one size share one program."""
    side, stride = tiles
    batch, height, width, channels = x.shape
    places = [(i, j) for i in range(-(-height // stride)) for j in range(-(-width // stride))]
    sizes = collections.defaultdict(list)
    for i, j in places:
        sizes[min(side, height - i * stride), min(side, width - j * stride)].append((i, j))
    coded = {}
    for (rows, columns), same in sizes.items():

        def tile(corner, shape=(batch, rows, columns, channels)):
            return code(jax.lax.dynamic_slice(x, (0, corner[0], corner[1], 0), shape))

        coded |= zip(same, jax.lax.map(tile, stride * jnp.array(same)), strict=True)
    return {place: coded[place] for place in places}


def _blend(
    before: Float[Array, "B h w C"], tile: Float[Array, "B H W C"], overlap: int, axis: int
) -> Float[Array, "B H W C"]:
    """The tile, whose first rows (axis 1) or columns (axis 2) fade in over the last ones of the tile before."""
    overlap = min(overlap, before.shape[axis], tile.shape[axis])
    weight = jnp.linspace(0, 1, overlap, endpoint=False).reshape([-1 if i == axis else 1 for i in range(4)])
    end = before.shape[axis]
    ending = jax.lax.slice_in_dim(before, end - overlap, end, axis=axis)
    first, rest = jnp.split(tile, [overlap], axis)
    return jnp.concatenate([ending * (1 - weight) + first * weight, rest], axis)
