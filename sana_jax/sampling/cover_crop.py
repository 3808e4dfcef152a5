"""From the size that was drawn to the size that was asked for."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def cover_and_crop(pictures: Float[Array, "B H W C"], height: int, width: int) -> Float[Array, "B h w C"]:
    r"""Resizes so that the pictures just cover height x width, proportions kept, and cuts out the centre.

    With $r = \max(h/H, w/W)$ the pictures become $\lfloor rH \rfloor \times \lfloor rW \rfloor$ by bilinear interpolation
    between pixel centres: output pixel i lies at $(i + 1/2) H / \lfloor rH \rfloor - 1/2$. Beyond the outermost centres the
    outermost pixel continues. No low-pass filter when it shrinks. All as diffusers does after resolution binning
    (`resize_and_crop_tensor`), except where rounding of $r$ makes its picture one pixel too small and its crop fail: here
    it covers always.
    """
    drawn_height, drawn_width = pictures.shape[1:3]
    if (drawn_height, drawn_width) == (height, width):
        return pictures
    ratio = max(height / drawn_height, width / drawn_width)
    for axis, drawn, size in ((1, drawn_height, height), (2, drawn_width, width)):
        below, above, weight = _taps(drawn, max(int(drawn * ratio), size), size)
        weight = weight.reshape((-1,) + (1,) * (3 - axis))
        pictures = jnp.take(pictures, below, axis) * (1 - weight) + jnp.take(pictures, above, axis) * weight
    return pictures


def _taps(drawn: int, resized: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two pixels, and the second one's weight, of each of the middle `size` pixels of `drawn` resized to `resized`."""
    index = np.arange(size) + (resized - size) // 2
    position = np.maximum((index + 0.5) * (drawn / resized) - 0.5, 0)
    below = np.minimum(position.astype(np.int32), drawn - 1)
    return below, np.minimum(below + 1, drawn - 1), (position - below).astype(np.float32)
