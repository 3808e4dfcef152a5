"""Makes a set from a folder of pictures, each with its captions in files of the same name, or of tar files of such."""

import functools
import itertools
import math
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from absl import logging
from PIL import Image

from sana_jax.data import caption_files, records, transforms
from sana_jax.data.threads import in_order

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_TAR = ".tar"
_TEXTS = (caption_files.TEXT, caption_files.SCORES, caption_files.JSON)


def build(source: Path, output: Path, *, heldout: float = 0.0, min_score: float = 0.0, overwrite: bool = False) -> dict:
    """Packs `source` (X.png, X.jpg, X.jpeg or X.webp with X.txt, in any depth) into the set `output`.

    The same in .tar files, as the WebDataset format has it: what belongs together is called the same up to the first dot of
    the file's name, and follows each other.

    Every line of X.txt that is not empty is one caption; training draws one of them at a time, by their scores where there are
    any (`caption_files` has all the files that are read). The picture files are kept as they are. A picture that cannot be
    decoded, or that has no caption, is skipped, logged and listed in `dataset.json`.

    Args:
      source, output: the folders.
      heldout: share of the pictures, from 0 to below 1, that training never sees (`records.is_held_out`).
      min_score: pictures whose best caption has a lower score are left out; what nobody scored stays.
      overwrite: `output` may be a set, which is replaced.

    Returns:
      What `dataset.json` says; "held_out" counts the pictures held out, "scored" those with scores, "low_score" those left out
      for theirs, "highest_score" that of any caption, "skipped" lists "FILE: why".

    Raises:
      ValueError: `heldout` is no such share, or `min_score` no score; `source` is no folder, holds no picture, or holds none that
        can be used; `source` is, or lies in, `output`, which would be replaced; or `output` holds files (`records.check_output`).
    """
    if not 0 <= heldout < 1:
        raise ValueError(f"--heldout={heldout} is not a share from 0 to below 1; 0.01 holds out a hundredth")
    if not 0 <= min_score < math.inf:
        raise ValueError(f"--min_score={min_score} is no score: CLIP's cosine times 100, as 22")
    source, output = Path(source), Path(output)
    if not source.is_dir():
        raise ValueError(f"--input {source} is not a folder")
    if source.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"--output {output} would replace the pictures of --input {source}; give another folder")
    records.check_output(output, overwrite)
    wanted = (*_SUFFIXES, _TAR, caption_files.JSON)
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in wanted and path.is_file())
    files = [path for path in found if path.suffix.lower() != caption_files.JSON]
    beside = caption_files.SideFiles(path for path in found if path.suffix.lower() == caption_files.JSON)
    if not files:
        raise ValueError(f"{source} holds no picture ({', '.join('*' + suffix for suffix in (*_SUFFIXES, _TAR))})")
    skipped: list[str] = []
    index = {"kind": "folder", "source": source.name, "heldout": heldout, "skipped": skipped}
    index |= {"held_out": 0, "scored": 0, "low_score": 0, "highest_score": 0.0}
    try:
        pictures = _read(_samples(files, beside, source), min_score, index)
        return records.write_dataset(output, pictures, index, overwrite=overwrite)
    except records.NoRecords as error:
        low = f"; {index['low_score']} have a best score below --min_score={min_score:g}" if index["low_score"] else ""
        first = f"; the first: {skipped[0]}" if skipped else ""
        count = len(skipped) + index["low_score"]
        raise ValueError(f"none of the {count} pictures in {source} can be used{low}{first}") from error


class _Sample(NamedTuple):
    """A picture with its captions.

    Attributes:
      name: within the folder.
      read: the picture's file and the captions; raises what is wrong with them.
    """

    name: PurePosixPath
    read: Callable[[], tuple[bytes, caption_files.Captions]]


def _samples(files: list[Path], beside: caption_files.SideFiles, source: Path) -> Iterator[_Sample]:
    for file in files:
        name = PurePosixPath(file.relative_to(source).as_posix())
        if file.suffix.lower() == _TAR:
            yield from _samples_of_tar(file, name, beside)
        else:
            yield _Sample(name, functools.partial(_read_files, file, beside))


def _samples_of_tar(file: Path, name: PurePosixPath, beside: caption_files.SideFiles) -> Iterator[_Sample]:
    try:
        of_all = beside.of(file)
        with tarfile.open(file, "r:") as tar:
            for key, members in itertools.groupby(
                filter(tarfile.TarInfo.isfile, tar), lambda member: _parts(member)[0]
            ):
                found = {_parts(member)[1]: member for member in members}
                files = {
                    suffix: tar.extractfile(found[suffix]).read() for suffix in (*_SUFFIXES, *_TEXTS) if suffix in found
                }
                texts = {suffix: files.pop(suffix) for suffix in _TEXTS if suffix in files}
                stem = PurePosixPath(key).name
                for suffix, picture in files.items():
                    read = functools.partial(_with_captions, picture, stem, key, texts, of_all)
                    yield _Sample(name / found[suffix].name, read)
                for suffix, member in found.items() if not files else ():
                    if suffix.endswith(_SUFFIXES):
                        reason = f"is taken for a file {suffix!r}: names in a tar end at their first dot"
                        yield _Sample(name / member.name, functools.partial(_fail, reason))
    except (tarfile.TarError, OSError, EOFError) as error:
        yield _Sample(name, functools.partial(_fail, f"can be read no further: {error}"))
    except ValueError as error:  # of a file beside it
        yield _Sample(name, functools.partial(_fail, str(error)))


def _parts(member: tarfile.TarInfo) -> tuple[str, str]:
    """(name up to its first dot, the rest in small letters)"""
    folder, slash, name = member.name.rpartition("/")
    stem, dot, suffix = name.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix.lower()}"


def _read_files(picture: Path, beside: caption_files.SideFiles) -> tuple[bytes, caption_files.Captions]:
    files = {suffix: picture.with_suffix(suffix) for suffix in _TEXTS}
    texts = {suffix: file.read_bytes() for suffix, file in files.items() if file.is_file()}
    return _with_captions(picture.read_bytes(), picture.stem, picture.stem, texts, beside.of(picture))


def _with_captions(picture: bytes, stem: str, key: str, texts: dict[str, bytes], beside: list) -> tuple:
    return picture, caption_files.gather(stem, key, texts, beside)


def _fail(reason: str):
    raise ValueError(reason)


def _read(samples: Iterator[_Sample], min_score: float, index: dict) -> Iterator[records.Record]:
    """The records, while `index` counts and lists them."""
    for name, found in in_order(_record_or_error, samples):
        if isinstance(found, Exception):
            index["skipped"].append(f"{name}: {found}")
            logging.warning("skipped %s: %s", name, found)
            continue
        best = max(filter(None, found.scores), default=0.0)
        index["highest_score"] = max(index["highest_score"], best)
        if found.scores and best < min_score:
            index["low_score"] += 1
        else:
            index["held_out"] += records.is_held_out(name, index["heldout"])
            index["scored"] += bool(found.scores)
            yield found


def _record_or_error(sample: _Sample) -> tuple[str, records.Record | Exception]:
    name = str(sample.name)
    try:
        picture, captions = sample.read()
        transforms.decode(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
        return name, error
    return name, records.Record(name, picture, captions.texts, captions.scores)
