r"""Arrays in eight bits: blocks along the last axis, each coded linearly from its minimum to its maximum.

    scale = (max - min) / 255,   code = round((x - min) / scale),   x ~ code * scale + min

Source: reference `sana.md` 6.4 (SANA-1.5, CAME-8bit). There a block is 2,048 elements of the flattened tensor; here it is a
shorter piece of a row, so that no block reaches from one device to another.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

MAX_SHARDS = 64
MIN_BLOCK, MAX_BLOCK = 16, 256


class Blockwise(NamedTuple):
    """An array [..., N] in eight bits, K = N / `block_size(N)`; its leaves are named .../codes, .../scale, .../minimum.

    All three are split over devices as the array would be.
    """

    codes: UInt8[Array, "*S N"]
    scale: Float[Array, "*S K"]
    minimum: Float[Array, "*S K"]


def block_size(width: int) -> int:
    """Elements of a block in a row of `width`: 35 of 2240, 175 of 11200, 18 of 1152.

    The largest divisor up to 256 of the narrowest share that a device may have of the row: it is halved up to six times
    (64 devices) while that leaves whole numbers from 16 on. The mesh has no say in it, nor the table that says which
    axes are split, so that a checkpoint restores onto any mesh, and no mesh up to 64 cuts a block. The price: 1.23 bytes
    an element at width 2240, where blocks of 224 would take 1.04.
    """
    halvings = [k for k in range(1, MAX_SHARDS.bit_length()) if width % 2**k == 0 and width >> k >= MIN_BLOCK]
    share = width >> max(halvings, default=0)
    return max(size for size in range(1, min(share, MAX_BLOCK) + 1) if share % size == 0)


def quantise(x: Float[Array, "*S N"], threshold: float | Float[Array, " N"] = 0.5) -> Blockwise:
    """Codes of a float32 array. A block of equal elements comes back exactly, one that is not finite stays so.

    Args:
      x: the array.
      threshold: in [0, 1). A value goes up to the next code where at least 1 - threshold of the way is behind it; 0.5
        is rounding to the nearest.
    """
    width = x.shape[-1]
    blocks = x.reshape(*x.shape[:-1], -1, block_size(width))
    minimum, maximum = jnp.min(blocks, -1), jnp.max(blocks, -1)
    scale = (maximum - minimum) / 255
    distance = (blocks - minimum[..., None]) / jnp.where(scale > 0, scale, 1)[..., None]
    threshold = jnp.broadcast_to(threshold, (width,)).reshape(blocks.shape[-2:])
    codes = jnp.clip(jnp.floor(distance + threshold), 0, 255).astype(jnp.uint8)
    return Blockwise(codes.reshape(x.shape), scale, minimum)


def dequantise(x: Blockwise) -> Float[Array, "*S N"]:
    """The array, float32, to within half a scale (one scale where the threshold was not 0.5)."""
    codes = x.codes.reshape(*x.scale.shape, -1).astype(jnp.float32)
    return (codes * x.scale[..., None] + x.minimum[..., None]).reshape(x.codes.shape)


def moving_threshold(step: Int[Array, ""], width: int) -> Float[Array, " N"]:
    r"""Thresholds for `quantise` that change with the step and, over the steps, fall evenly on [0, 1).

    Rounding to the nearest puts back an average that moves by less than half a code a step, at every step; with these
    it moves by a code as often as is right in the mean. Element i has the fractional part of $n / p + i / p^2$ in step n,
    p = 1.3247 the plastic number ($p^3 = p + 1$), of all such sequences the most even; computed in integers, so that
    every run and device has the same bits.
    """
    element = jnp.arange(width, dtype=jnp.uint32)
    phase = step.astype(jnp.uint32) * jnp.uint32(0xC13FA9A9) + element * jnp.uint32(0x91E10DA5)
    return (phase >> 8).astype(jnp.float32) * 2.0**-24
