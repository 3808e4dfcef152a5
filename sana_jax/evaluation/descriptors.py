"""What tells one artist's hand from another's without a network: colours, softness of shading, and margins.

All of it is of the drawing alone (`background.foreground`), whatever colour lies behind.
"""

import numpy as np
from jaxtyping import Float, UInt8

from sana_jax.evaluation import background

_BATCH = 64  # pictures at a time, for memory
_COLOUR_BINS = 8
_GRADIENT_BINS = 16
_MARGIN_SHARE = 4  # margins are looked at over 1/4 of the side
_MARGIN_STEPS = 16


def describe(pictures: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
    """Colour histogram, histogram of gradients, margins and filled share of each drawing, side by side."""
    parts = []
    for first in range(0, len(pictures), _BATCH):
        batch = pictures[first : first + _BATCH].astype(np.float32)
        mask = background.foreground(pictures[first : first + _BATCH])
        filled = mask.mean(axis=(1, 2))[:, None]
        described = [colour_histogram(batch, mask), gradient_histogram(batch, mask), margins(mask), filled]
        parts.append(np.concatenate(described, axis=1).astype(np.float32))
    return np.concatenate(parts)


def colour_histogram(
    pictures: Float[np.ndarray, "N H W 3"], mask: Float[np.ndarray, "N H W"]
) -> Float[np.ndarray, "N 512"]:
    """Square roots of the shares of 8 x 8 x 8 colours in the drawing.

    Every pixel is divided among the eight bins around it (trilinear), so that a slightly different colour is a slightly
    different histogram; of roots, the inner product compares histograms (Hellinger).
    """
    number, row, column = np.nonzero(mask)
    weight = mask[number, row, column]
    place = pictures[number, row, column] * ((_COLOUR_BINS - 1) / 255)
    low = np.minimum(place.astype(np.int64), _COLOUR_BINS - 2)
    high_share = place - low
    shares = np.stack([1 - high_share, high_share])  # [2, pixels, 3]
    first_bin = number * _COLOUR_BINS**3 + low @ np.array([_COLOUR_BINS**2, _COLOUR_BINS, 1])
    counts = np.zeros(len(pictures) * _COLOUR_BINS**3)
    for r, g, b in np.ndindex(2, 2, 2):
        share = weight * shares[r, :, 0] * shares[g, :, 1] * shares[b, :, 2]
        counts += np.bincount(first_bin + (r * _COLOUR_BINS + g) * _COLOUR_BINS + b, share, minlength=counts.size)
    return np.sqrt(counts.reshape(len(pictures), -1) / (mask.sum(axis=(1, 2))[:, None] + 1e-3))


def gradient_histogram(
    pictures: Float[np.ndarray, "N H W 3"], mask: Float[np.ndarray, "N H W"]
) -> Float[np.ndarray, "N 16"]:
    """Shares of the drawing by steepness, in 16 logarithmic bins: flat fills, soft shading, hard edges."""
    inside = mask[:, :-1, :-1]
    right, down = np.diff(pictures, axis=2)[:, :-1], np.diff(pictures, axis=1)[:, :, :-1]
    steepness = np.sqrt((right**2 + down**2).sum(axis=-1))
    place = np.log1p(steepness) * ((_GRADIENT_BINS - 1) / np.log1p(255 * np.sqrt(6)))
    low = np.minimum(place.astype(np.int64), _GRADIENT_BINS - 2)
    high_share = place - low
    first_bin = (np.arange(len(pictures))[:, None, None] * _GRADIENT_BINS + low).ravel()
    size = len(pictures) * _GRADIENT_BINS
    counts = np.bincount(first_bin, (inside * (1 - high_share)).ravel(), size)
    counts += np.bincount(first_bin + 1, (inside * high_share).ravel(), size)
    return counts.reshape(len(pictures), -1) / (inside.sum(axis=(1, 2))[:, None] + 1e-3)


def margins(mask: Float[np.ndarray, "N H W"]) -> Float[np.ndarray, "N 64"]:
    """From each side inwards: whether the drawing has begun by then, at 16 depths down to a quarter of the side."""
    out = []
    for profile in (mask.max(axis=2), mask.max(axis=1)):
        for inwards in (profile, profile[:, ::-1]):
            begun = np.maximum.accumulate(inwards, axis=1)
            depths = np.linspace(0, begun.shape[1] / _MARGIN_SHARE, _MARGIN_STEPS, endpoint=False).astype(int)
            out.append(begun[:, depths])
    return np.concatenate(out, axis=1)
