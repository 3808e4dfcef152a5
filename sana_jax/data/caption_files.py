"""What stands beside a picture and says what it shows: captions, and how well a model thinks that each fits.

Of a picture X.png in a folder, or of the sample X in SHARD.tar:

    X.txt                       a caption a line
    X.scores.txt                a score a line, of the same captions

and as NVlabs/Sana has it, with a caption of each model that described the picture; what follows _ stands beside X.png, for
samples of SHARD.tar beside that:

    X.json                      {"prompt": CAPTION, MODEL: CAPTION, ...}, where there is no X.txt, or a MODEL has a score
    X_..., SHARD_....json       {"X": {MODEL: CAPTION}}
    ..._clip_score.json         {"X": {MODEL: SCORE, "prompt": SCORE}}; the first line of X.txt is called "prompt" too

Scores are CLIP's cosines times 100; one below 0 counts as 0.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

TEXT, SCORES, JSON = ".txt", ".scores.txt", ".json"
_PROMPT = "prompt"
_SCORED = "_clip_score"


class Captions(NamedTuple):
    """Of a picture.

    Attributes:
      texts: one or more.
      scores: of each, None where nobody scored it; empty where none has one.
      unmatched: names that have a score and no caption.
    """

    texts: tuple[str, ...]
    scores: tuple[float | None, ...] = ()
    unmatched: tuple[str, ...] = ()


class SideFiles:
    """The JSON files that stand beside pictures and tar files, found by what they stand beside."""

    def __init__(self, paths: Iterable[Path], owners: Iterable[Path]):
        """Of `paths` each belongs to that one of `owners`, pictures and tar files, with whose name it begins, the longest if several."""
        stems = {str(owner.with_suffix("")) for owner in owners}
        self._paths: dict[str, list[Path]] = {}
        for path in sorted(paths):
            stem = str(path.with_suffix(""))
            end = len(stem)
            while end > 0 and stem[:end] not in stems:
                end = stem.rfind("_", len(stem) - len(path.stem), end)
            if 0 < end < len(stem):  # with all of it, it is the owner's own
                self._paths.setdefault(stem[:end], []).append(path)

    def of(self, owner: Path) -> list[tuple[str, Any]]:
        """(what follows the owner's stem in the file's name, what the file holds) of each, in the order of their names.

        Raises:
          ValueError: a file is no JSON.
        """
        paths = self._paths.get(str(owner.with_suffix("")), ())
        return [(path.stem[len(owner.stem) :], _parsed(path.read_bytes(), path.name)) for path in paths]


def gather(name: str, key: str, files: Mapping[str, bytes], beside: Iterable[tuple[str, Any]] = ()) -> Captions:
    """The captions of a picture.

    Args:
      name: of its files without what they end in, for messages.
      key: its name in the files beside it.
      files: by TEXT, SCORES and JSON, as many as there are.
      beside: what `SideFiles.of` found.

    Raises:
      ValueError: there is no caption, or a file is not as at the top of this file.
    """
    own = functools.cache(lambda: _mapping(_parsed(files[JSON], f"{name}{JSON}"), f"{name}{JSON}"))
    texts: dict[str | int, str] = {}
    if TEXT in files:
        texts |= {number or _PROMPT: line for number, line in enumerate(_lines(files[TEXT]))}
    elif JSON in files:
        texts |= _told(own(), _PROMPT)
    scores = _line_scores(files[SCORES], f"{name}{SCORES}", texts) if SCORES in files else {}
    for suffix, content in beside:
        of_key = content.get(key, {}) if isinstance(content, Mapping) else None
        if not isinstance(of_key, Mapping):
            logging.warning(
                "%s%s%s is passed over: it has no captions or scores by name of %s", name, suffix, JSON, key
            )
            continue
        for model, value in of_key.items():
            if suffix.endswith(_SCORED):
                scores[model] = _score(value, f"the file {suffix}{JSON} beside it")
            elif isinstance(value, str) and value.strip():
                texts[suffix.replace(".", "_") if model == _PROMPT else model] = value.strip()
    for model in sorted(scores.keys() - texts.keys()) if JSON in files else ():
        texts |= _told(own(), model)
    if not texts:
        state = "is empty" if TEXT in files else "is missing"
        raise ValueError(f"has no caption: {name}{TEXT} {state}")
    found = tuple(scores.get(which) for which in texts)
    unmatched = tuple(str(model) for model in scores if model not in texts)
    return Captions(tuple(texts.values()), () if all(score is None for score in found) else found, unmatched)


def _told(own: Mapping, model: str) -> dict[str, str]:
    """The caption of a model in a sample's own JSON file, where it has one."""
    caption = own.get(model)
    return {model: caption.strip()} if isinstance(caption, str) and caption.strip() else {}


def _lines(text: bytes) -> list[str]:
    return [line.strip() for line in text.decode("utf-8-sig").split("\n") if line.strip()]


def _line_scores(text: bytes, name: str, texts: Mapping[str | int, str]) -> dict[str | int, float]:
    lines = _lines(text)
    if len(lines) != len(texts):
        raise ValueError(f"{name} has {len(lines)} scores of {len(texts)} captions; write one a line, in their order")
    return {which: _score(line, name) for which, line in zip(texts, lines, strict=True)}


def _score(value: Any, name: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{name} has the score {value!r}; a score is a number, CLIP's cosine times 100")
    return max(score, 0.0)


def _parsed(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from error


def _mapping(value: Any, name: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} has {value!r:.60} where names with captions or scores are expected")
    return value
