r"""Arrays in eight bits: every block of an array coded linearly from its minimum to its maximum.

    scale = (max - min) / 255,   code = round((x - min) / scale),   x ~ code * scale + min

Source: SANA-1.5's CAME-8bit (NVlabs/Sana), where a block is 2,048 elements of the flattened tensor. Here
it is a whole row or column of a matrix, 2,240 to 11,200 elements at width 2240, so that nothing is reshaped. What
XLA needs for temporaries in the update of 1.6B on eight v5p chips, which hold 802 MB of its float32 parameters each:

    block                                     CAME-8bit   Adam-8bit   bytes an element
    35 to 210 elements along the last axis      1,748 MB    3,124 MB    1.04 to 1.23
    a row or column                               436 MB      366 MB           1.002

Chips keep arrays in tiles of 128 columns; a reshape to any divisor of 2240 or 11200 rewrites them with gaps.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


class Blockwise(NamedTuple):
    """An array in eight bits; its leaves are named .../codes, .../scale and .../minimum.

    `codes` have the array's shape; the others have length 1 along the axis that blocks lie on. All three are split over
    devices as the array would be.
    """

    codes: UInt8[Array, "*S"]
    scale: Float[Array, "*K"]
    minimum: Float[Array, "*K"]


def quantise(x: Float[Array, "*S"], axis: int, threshold: float | Float[Array, ""] = 0.5) -> Blockwise:
    """Codes of a float32 array. A block of equal elements comes back exactly; one that is not finite stays so.

    Args:
      x: the array.
      axis: that blocks lie on, from end to end.
      threshold: in [0, 1). A value goes up to the next code where at least 1 - threshold of the way is behind it; 0.5
        is rounding to the nearest.
    """
    minimum, maximum = jnp.min(x, axis, keepdims=True), jnp.max(x, axis, keepdims=True)
    scale = (maximum - minimum) / 255
    distance = (x - minimum) / jnp.where(scale == 0, 1, scale)
    return Blockwise(jnp.clip(jnp.floor(distance + threshold), 0, 255).astype(jnp.uint8), scale, minimum)


def dequantise(x: Blockwise) -> Float[Array, "*S"]:
    """The array, float32, to within half a scale (one scale where the threshold was not 0.5)."""
    return x.codes.astype(jnp.float32) * x.scale + x.minimum


def moving_threshold(step: Int[Array, ""]) -> Float[Array, ""]:
    """A threshold for `quantise` that over the steps falls evenly on [0, 1): fractional parts of the golden ratio's
    multiples, computed in integers so that every run has the same bits.

    Rounding to the nearest puts an average that moves by less than half a code a step back to where it was, at every
    step. With these thresholds it moves by a code as often as is right in the mean.
    """
    phase = step.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    return (phase >> 8).astype(jnp.float32) * 2.0**-24
