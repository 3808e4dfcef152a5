"""The background of a drawing: which colour it has, and the drawing taken off it."""

import numpy as np
from jaxtyping import Float, UInt8

from sana_jax.data.emoji import BACKGROUNDS

# Distances in RGB, 0..255. What compression changes lies below the first: 30 dB are a distance of 14. A pixel that is the
# second from the background's colour belongs to the drawing altogether.
_NEAR, _FAR = 20.0, 48.0
_GREY = 128.0
_BATCH = 64  # pictures at a time, for memory
_CORNER = 32  # a corner is a square of 1/32 of the side


def names(pictures: UInt8[np.ndarray, "N H W 3"]) -> list[str]:
    """The palette's colour of each picture's background, from its corners.

    A corner pixel at the distance d (Euclidean in RGB, 0..255) from a colour gives it the vote $2^{-(d/20)^2}$, so that
    drawings that reach into corners, mostly in colours between those of the palette, are outvoted. The border as a whole
    would not do: 3 % of the drawings (square signs, crowds) run along more than half of it.
    """
    palette = list(BACKGROUNDS)
    distances = _distances(_corners(pictures), np.array(list(BACKGROUNDS.values()), np.float32))
    votes = (2.0 ** -((distances / _NEAR) ** 2)).sum(axis=1)
    return [palette[index] for index in votes.argmax(axis=1)]


def colours(pictures: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N 3"]:
    """The background's colour as it is: of the corner pixels' colours, the one with most of the others around it."""
    corners = _corners(pictures)
    distances = np.stack([_distances(one[None], one)[0] for one in corners])
    votes = (2.0 ** -((distances / _NEAR) ** 2)).sum(axis=1)
    return corners[np.arange(len(corners)), votes.argmax(axis=1)]


def _corners(pictures: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N C 3"]:
    side = max(1, pictures.shape[1] // _CORNER)
    rows = [pictures[:, :side], pictures[:, -side:]]
    parts = [part.reshape(len(pictures), -1, 3) for row in rows for part in (row[:, :, :side], row[:, :, -side:])]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _distances(a: Float[np.ndarray, "N C 3"], b: Float[np.ndarray, "P 3"]) -> Float[np.ndarray, "N C P"]:
    return np.linalg.norm(a[:, :, None] - b, axis=-1)


def foreground(pictures: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N H W"]:
    """How much each pixel belongs to the drawing, 0..1, by its distance from the background's colour."""
    background = colours(pictures)[:, None, None]
    distance = np.sqrt(((pictures.astype(np.float32) - background) ** 2).sum(axis=-1))
    return np.clip((distance - _NEAR) / (_FAR - _NEAR), 0, 1)


def on_grey(pictures: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "N H W 3"]:
    """The drawings on middle grey, so that what judges them does not see the background they were asked on."""
    out = np.empty_like(pictures)
    for first in range(0, len(pictures), _BATCH):
        batch = pictures[first : first + _BATCH]
        mask = foreground(batch)[..., None]
        out[first : first + _BATCH] = np.rint(mask * batch + (1 - mask) * _GREY)
    return out
