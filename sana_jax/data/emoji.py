"""The emoji set's rules: which styles, which background colours, and which pictures no training ever sees."""

import hashlib
from collections.abc import Sequence

from sana_jax.data import captions
from sana_jax.data.records import Emoji

STYLES = ("noto", "fluent-3d", "fluent-flat", "fxemoji", "twemoji")

# Chosen far apart: the closest pair is 95 apart in RGB (Euclidean, of 442), so that a generated background is
# recognised by its nearest colour.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "black": (24, 24, 24),
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 225, 90),
    "green": (50, 165, 75),
    "blue": (45, 100, 220),
    "purple": (130, 50, 185),
    "pink": (250, 165, 205),
}

_HELD_OUT_STYLES = ("noto", "twemoji", "fluent-3d")
_VARIATION_SELECTORS = (0xFE0E, 0xFE0F)


def normalise_codepoints(text: str) -> str:
    """ "1F468-200D-1F373-FE0F" -> "1f468-200d-1f373": lower-case hex joined by "-", variation selectors dropped."""
    points = [int(part, 16) for part in text.split("-")]
    return "-".join(f"{point:x}" for point in points if point not in _VARIATION_SELECTORS)


def is_held_out(codepoints: str, style: str) -> bool:
    """Whether a (concept, style) pair is kept from all training, the autoencoder's included.

    Held out is every pair whose SHA-256 of "codepoints/style" starts with the hexadecimal digit 0, for the styles
    noto, twemoji and fluent-3d. fluent-flat nearly copies fluent-3d, so it follows it. The concept is then still seen
    in other styles, and the style on other concepts: what is tested is their composition.
    """
    if style == "fluent-flat":
        style = "fluent-3d"
    if style not in _HELD_OUT_STYLES:
        return False
    return hashlib.sha256(f"{normalise_codepoints(codepoints)}/{style}".encode()).hexdigest().startswith("0")


def caption(style: str, name: str, background: str, keywords: Sequence[str] = ()) -> str:
    """The plain caption, as evaluation asks for pictures: "a red apple, noto style, on a blue background".

    Args:
      style: one of `STYLES`.
      name: a label as in the records, e.g. "red apple".
      background: one of `BACKGROUNDS`.
      keywords: follow the name, e.g. ("fruit", "ripe").

    Raises:
      ValueError: an unknown style or background.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; the styles are {', '.join(STYLES)}")
    if background not in BACKGROUNDS:
        raise ValueError(f"unknown background {background!r}; the backgrounds are {', '.join(BACKGROUNDS)}")
    return captions.compose(
        captions.with_article(captions.plain_name(name)), captions.plain_style(style), background, keywords
    )


def plain_caption(emoji: Emoji, background: str) -> str:
    """`caption` of a record, without keywords."""
    return caption(emoji.style, emoji.label, background)
