"""Which caption a picture is trained with: one of a photograph's, or a sentence made for an emoji drawing.

Sentences have a name with its article, a style, a background colour and keywords, in several orders.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
    """How captions vary in training. Shares are probabilities per picture; they are of drawings, and scores of photographs.

    Attributes:
      min_score: captions of a photograph with lower scores are not drawn (CLIP's cosine times 100; SANA: 25).
      temperature: of the draw, see `draw_caption` (SANA: 0.1).
      keyword_share: of the captions that carry keywords.
      max_keywords: those carry 1 to this many.
      plain_order_share: of the captions in the order of `emoji.caption`; the rest are drawn from the other orders.
      no_article_share: of the captions that name the thing bare, "red apple" for "a red apple".
      no_style_share: of the captions that leave the style out, so that prompts without a style are known.
      no_background_share: of the *white* pictures' captions, those that leave the background out: unnamed means white.
        Every other background is always named.
    """

    min_score: float = 25.0
    temperature: float = 0.1
    keyword_share: float = 0.5
    max_keywords: int = 3
    plain_order_share: float = 0.6
    no_article_share: float = 0.2
    no_style_share: float = 0.05
    no_background_share: float = 0.3

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_share") and not 0 <= value <= 1:
                raise ValueError(f"{field.name}={value} is not a probability; use a number from 0 to 1")
        if self.max_keywords < 1:
            raise ValueError(f"max_keywords={self.max_keywords} is less than 1; for none, use keyword_share=0")
        if not 0 <= self.min_score < math.inf:
            raise ValueError(
                f"min_score={self.min_score} is no score; use 0, with which every caption that has a score is drawn, or more"
            )
        if not 0.01 <= self.temperature <= math.inf:
            raise ValueError(
                f"temperature={self.temperature} is not 0.01 or more; with 0.01 the best caption is drawn, with inf each is as likely"
            )


_ORDERS = 4

# Heads of names that take no article: uncountable, or no nouns at all. Plurals are known by their ending.
_NO_ARTICLE = frozenset(
    """
    away badminton bacon baseball basketball bowling bread breast-feeding broccoli butter camping candy clothing
    construction cooking coral custard dango divide dizzy dna down falafel fire fishing fog foggy fondue food
    football garlic ginger hockey ice infinity lacrosse laughing lightning liquid locked luggage meat milk money
    multiply oden pong popcorn prohibited racing radioactive rice rolling sake salt score shrimp soap softball
    spaghetti star-struck sushi tennis together unlocked up volleyball voltage water wireless wood yarn
    """.split()
)
_SINGULAR_IN_S = frozenset(
    [
        "abacus",
        "bus",
        "cactus",
        "fleur-de-lis",
        "hibiscus",
        "hippopotamus",
        "lotus",
        "minibus",
        "minus",
        "octopus",
        "plus",
        "rhinoceros",
        "trolleybus",
    ]
)
# Capitalised, and still no proper names.
_COMMON = ("ATM", "BACK", "Christmas tree", "END", "Japanese", "OK", "ON!", "SOON", "T-Rex", "TOP")
# The first letter misleads about the first sound: "an hourglass", "a unicorn".
_VOWEL_SOUND = ("hour", "x-ray")
_CONSONANT_SOUND = ("euro", "ewe", "one", "uni")
_ENDS_HEAD = re.compile(
    r" (?:and|at|behind|curving|facing|from|holding|in|of|on|over|pointed|pointing|showing|with|without) "
)


def plain_name(label: str) -> str:
    """A label as people write it: typographic apostrophes become plain, colons become words.

    "man: red hair" -> "man with red hair"; "woman: bald" -> "bald woman"; "kiss: woman, man" -> "kiss of woman and
    man"; "person running: facing right" -> "person running facing right".
    """
    label = label.replace("’", "'").replace("ñ", "n")
    head, colon, detail = label.partition(": ")
    if not colon:
        return label
    if detail == "bald":
        return f"bald {head}"
    if "hair" in detail or detail == "beard":
        return f"{head} with {'a ' if detail == 'beard' else ''}{detail}"
    if ", " in detail:
        first, _, last = detail.rpartition(", ")
        return f"{head} of {first} and {last}"
    return f"{head} {detail}"


def plain_style(style: str) -> str:
    """A style as it is written in a caption: "fluent-3d" -> "fluent 3d"."""
    return style.replace("-", " ")


def with_article(name: str) -> str:
    """ "red apple" -> "a red apple", "ear" -> "an ear"; plural, uncountable and proper names stay as they are."""
    if not _takes_article(name):
        return name
    lower = name.lower()
    vowel = lower[0] in "aeiou" and not lower.startswith(_CONSONANT_SOUND) or lower.startswith(_VOWEL_SOUND)
    return f"{'an' if vowel else 'a'} {name}"


def _takes_article(name: str) -> bool:
    first = name.split()[0]
    if first in ("person", "man", "woman"):
        return True
    if first in ("people", "men", "women", "no", "two") or first[0].isdigit():
        return False
    if first[0].isupper() and not name.startswith(_COMMON):
        return False
    head = _ENDS_HEAD.split(name)[0].split()[-1]  # "nest with eggs" is one nest
    if head in _NO_ARTICLE:
        return False
    return not head.endswith("s") or head.endswith("ss") or head in _SINGULAR_IN_S


def compose(name: str, style: str | None, background: str | None, keywords: Sequence[str] = (), order: int = 0) -> str:
    """Puts a caption's parts into a sentence.

    Args:
      name: with its article, "a red apple".
      style: as `plain_style` gives it; None leaves it out.
      background: a colour; None leaves it out.
      keywords: follow the name.
      order: 0 to 3, of the parts; 0: "a red apple, fruit, noto style, on a blue background".
    """
    article = "an" if background and background[0] in "aeiou" else "a"
    styled = [] if style is None else [f"{style} style"]
    grounded = [] if background is None else [f"on {article} {background} background"]
    match order:
        case 0:
            parts = [name, *keywords, *styled, *grounded]
        case 1:
            parts = [name, *keywords, *grounded, *styled]
        case 2:
            parts = [" ".join([name, *grounded]), *keywords, *styled]
        case 3:
            parts = [*styled, name, *keywords, *grounded]
        case _:
            raise ValueError(f"order={order} is not from 0 to {_ORDERS - 1}")
    return ", ".join(parts)


def draw_caption(
    config: CaptionConfig, captions: Sequence[str], scores: Sequence[float | None], rng: np.random.Generator
) -> str:
    """Draws a training caption of a photograph; takes one random number.

    Of the captions whose score c is at least `config.min_score` with p ~ c^(1 / temperature); where none is, the one with the
    best score; where none has a score, each is as likely. One without a score is not drawn beside others that have one. (NVlabs/Sana's code; the paper writes softmax(c / temperature).)

    Args:
      captions: one or more.
      scores: of each, None where nobody scored it; or empty.
    """
    place = rng.random()
    if not any(score is not None for score in scores):
        return captions[int(place * len(captions))]
    scores = np.asarray([-1.0 if score is None else score for score in scores])
    if scores.max() < config.min_score or scores.max() == 0:
        return captions[int(np.argmax(scores))]
    allowed = np.flatnonzero(scores >= config.min_score)
    weights = np.cumsum((scores[allowed] / scores.max()) ** (1 / config.temperature))
    return captions[allowed[np.searchsorted(weights, place * weights[-1], side="right")]]


def random_caption(
    config: CaptionConfig, label: str, style: str, tags: Sequence[str], background: str, rng: np.random.Generator
) -> str:
    """Draws a training caption of a drawing on a background; how much randomness it takes depends on `tags` alone."""
    order, other, article, no_style, no_background, keyworded, count = rng.random(7)
    ranks = rng.random(len(tags))
    name = plain_name(label)
    words = set(name.lower().split())
    keywords = []
    if keyworded < config.keyword_share:
        candidates = [tags[i] for i in np.argsort(ranks) if tags[i].lower() not in words]
        keywords = [plain_name(tag) for tag in candidates[: 1 + int(count * config.max_keywords)]]
    return compose(
        name if article < config.no_article_share else with_article(name),
        None if no_style < config.no_style_share else plain_style(style),
        None if background == "white" and no_background < config.no_background_share else background,
        keywords,
        0 if order < config.plain_order_share else 1 + int(other * (_ORDERS - 1)),
    )
