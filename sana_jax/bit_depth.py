"""Pictures of more than eight bits a channel, which Pillow's own conversion cuts off at 255."""

import numpy as np
from PIL import Image


def to_eight_bits(picture: Image.Image) -> Image.Image:
    """The picture where its channels have eight bits, as most do; grey values of sixteen bits scaled to 0..255.

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
