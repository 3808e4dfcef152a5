"""Between eight bits a channel, as pictures are kept and moved, and what lies around them."""

import numpy as np
from jaxtyping import Array, Float, Num
from PIL import Image


def to_eight_bits(picture: Image.Image) -> Image.Image:
    """The picture where its channels have eight bits, as most do; grey values of sixteen bits scaled to 0..255.

    Pillow's own conversion cuts them off at 255.

    Raises:
      ValueError: its values are 32-bit integers or floats, of which no range is known.
    """
    if picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"has values of Pillow's mode {picture.mode}, whose range is unknown; save it in 8 bits a channel"
        )
    return picture


def from_eight_bits(
    pictures: Num[Array | np.ndarray, "*B H W 3"],
) -> Float[Array, "*B H W 3"] | Float[np.ndarray, "*B H W 3"]:
    """0..255 -> what the models take, float32 in -1..1: x / 127.5 - 1."""
    return pictures.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)
