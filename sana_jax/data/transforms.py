"""Picture bytes -> arrays of the size asked for. Nothing random happens here."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sana_jax.bit_depth import to_eight_bits

_FIRST_ON_ITS_SIDE = 5  # of EXIF's eight orientations


def decode(picture: bytes) -> Image.Image:
    """A picture file -> RGBA picture, RGB where nothing can be transparent, turned as its EXIF orientation says.

    Raises:
      ValueError: not a picture, or one whose values have no known range.
      OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: what Pillow says of a broken one.
    """
    try:
        opened = Image.open(io.BytesIO(picture))
    except UnidentifiedImageError:
        raise ValueError(f"is no picture that Pillow knows; it begins with {picture[:12]!r}") from None
    ImageOps.exif_transpose(opened, in_place=True)
    picture = to_eight_bits(opened)
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def size_of(picture: bytes) -> tuple[int, int]:
    """(height, width) of what `decode` makes of a picture file, read from its head alone; (0, 0) where that is damaged.

    A PNG that says only after its pixels that it lies on its side, which is rare, counts as upright.
    """
    try:
        with Image.open(io.BytesIO(picture)) as opened:
            width, height = opened.size
            exif = Image.Image.getexif(opened)  # PNG's own decodes the picture
            turned = exif.get(ExifTags.Base.Orientation, 1) >= _FIRST_ON_ITS_SIDE
    except Exception:  # noqa: BLE001 - whatever a broken file makes Pillow raise; `decode` will say it
        return 0, 0
    return (width, height) if turned else (height, width)


def resize_and_crop(picture: Image.Image, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 4"]:
    """Scales a picture to cover `size` (height, width), proportions kept, and cuts out the centre.

    Bicubic with antialiasing, as SANA resizes; colours are weighted with their opacity, so that what lies invisible
    under transparent pixels does not bleed into the outlines.
    """
    (width, height), (rows, columns) = picture.size, size
    if (width, height) != (columns, rows):
        shown_width, shown_height = min(width, height * columns / rows), min(height, width * rows / columns)
        left, top = (width - shown_width) / 2, (height - shown_height) / 2
        weighted = picture.convert("RGBa") if picture.mode == "RGBA" else picture
        box = (left, top, left + shown_width, top + shown_height)
        picture = weighted.resize((columns, rows), Image.Resampling.BICUBIC, box=box)
    return np.asarray(picture.convert("RGBA"))


def shift(rgba: UInt8[np.ndarray, "H W 4"], down: int, right: int) -> UInt8[np.ndarray, "H W 4"]:
    """Moves a drawing by whole pixels; what comes in from outside is transparent, what goes out is lost."""
    height, width = rgba.shape[:2]
    out = np.zeros_like(rgba)
    out[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = rgba[
        max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return out


def composite(
    rgba: UInt8[np.ndarray, "*B H W 4"],
    background: UInt8[np.ndarray, "*B 3"],
    out: UInt8[np.ndarray, "*B H W 3"] | None = None,
) -> UInt8[np.ndarray, "*B H W 3"]:
    r"""Lays pictures over plain colours: $\alpha c + (1-\alpha) b$, rounded, written to `out` if given.

    Where $\alpha$ is 0 the result is the background's value exactly, where it is 1 the picture's.
    """
    out = np.empty((*rgba.shape[:-1], 3), np.uint8) if out is None else out
    if rgba[..., 3].min() == 255:  # a photograph
        out[...] = rgba[..., :3]
        return out
    alpha = rgba[..., 3].astype(np.float32) / np.float32(255)
    for channel in range(3):  # NumPy is slow along an innermost axis of three
        plane, below = rgba[..., channel].astype(np.float32), background[..., channel, None, None].astype(np.float32)
        plane -= below
        plane *= alpha
        plane += below
        out[..., channel] = np.rint(plane, out=plane)
    return out
