"""Makes a set from a folder of pictures, each with its captions in a text file of the same name, or of tar files of such."""

import functools
import itertools
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from absl import logging
from PIL import Image

from sana_jax.data import records, transforms
from sana_jax.data.threads import in_order

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_TAR = ".tar"


def build(source: Path, output: Path, *, heldout: float = 0.0, overwrite: bool = False) -> dict:
    """Packs `source` (X.png, X.jpg, X.jpeg or X.webp with X.txt, in any depth) into the set `output`.

    The same in .tar files, as the WebDataset format has it: what belongs together is called the same up to the first dot of
    the file's name, and follows each other.

    Every line of X.txt that is not empty is one caption; training draws one of them at a time. The picture files are
    kept as they are. A picture that cannot be decoded, or that has no caption, is skipped, logged and listed in
    `dataset.json`.

    Args:
      source, output: the folders.
      heldout: share of the pictures, from 0 to below 1, that training never sees (`records.is_held_out`).
      overwrite: `output` may be a set, which is replaced.

    Returns:
      What `dataset.json` says; "held_out" counts the pictures held out, "skipped" lists "FILE: why".

    Raises:
      ValueError: `heldout` is no such share; `source` is no folder, holds no picture, or holds none that can be used; `source` is, or lies in,
        `output`, which would be replaced; or `output` holds files (`records.check_output`).
    """
    if not 0 <= heldout < 1:
        raise ValueError(f"--heldout={heldout} is not a share from 0 to below 1; 0.01 holds out a hundredth")
    source, output = Path(source), Path(output)
    if not source.is_dir():
        raise ValueError(f"--input {source} is not a folder")
    if source.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"--output {output} would replace the pictures of --input {source}; give another folder")
    records.check_output(output, overwrite)
    wanted = (*_SUFFIXES, _TAR)
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in wanted and path.is_file())
    if not files:
        raise ValueError(f"{source} holds no picture ({', '.join('*' + suffix for suffix in wanted)})")
    skipped: list[str] = []
    index = {"kind": "folder", "source": source.name, "heldout": heldout, "held_out": 0, "skipped": skipped}
    try:
        return records.write_dataset(output, _read(files, source, index), index, overwrite=overwrite)
    except records.NoRecords as error:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise ValueError(f"none of the {len(skipped)} pictures in {source} can be used{first}") from error


class _Sample(NamedTuple):
    """A picture with its captions.

    Attributes:
      name: within the folder.
      read: the picture's file and that of the captions, None where there is none; raises what is wrong with them.
    """

    name: PurePosixPath
    read: Callable[[], tuple[bytes, bytes | None]]


def _samples(files: list[Path], source: Path) -> Iterator[_Sample]:
    for file in files:
        name = PurePosixPath(file.relative_to(source).as_posix())
        if file.suffix.lower() == _TAR:
            yield from _samples_of_tar(file, name)
        else:
            yield _Sample(name, functools.partial(_read_files, file))


def _samples_of_tar(file: Path, name: PurePosixPath) -> Iterator[_Sample]:
    try:
        with tarfile.open(file, "r:") as tar:
            for _, members in itertools.groupby(filter(tarfile.TarInfo.isfile, tar), lambda member: _parts(member)[0]):
                found = {_parts(member)[1]: member for member in members}
                files = {
                    suffix: tar.extractfile(found[suffix]).read() for suffix in (*_SUFFIXES, ".txt") if suffix in found
                }
                captions = files.pop(".txt", None)
                for suffix, picture in files.items():
                    yield _Sample(name / found[suffix].name, functools.partial(lambda *both: both, picture, captions))
                for suffix, member in found.items() if not files else ():
                    if suffix.endswith(_SUFFIXES):
                        reason = f"is taken for a file {suffix!r}: names in a tar end at their first dot"
                        yield _Sample(name / member.name, functools.partial(_fail, reason))
    except (tarfile.TarError, OSError, EOFError) as error:
        yield _Sample(name, functools.partial(_fail, f"can be read no further: {error}"))


def _parts(member: tarfile.TarInfo) -> tuple[str, str]:
    """(name up to its first dot, the rest in small letters)"""
    folder, _, name = member.name.rpartition("/")
    stem, dot, suffix = name.partition(".")
    return f"{folder}/{stem}", f"{dot}{suffix.lower()}"


def _read_files(picture: Path) -> tuple[bytes, bytes | None]:
    captions = picture.with_suffix(".txt")
    return picture.read_bytes(), captions.read_bytes() if captions.is_file() else None


def _fail(reason: str):
    raise ValueError(reason)


def _read(files: list[Path], source: Path, index: dict) -> Iterator[records.Record]:
    """The records, while `index` counts and lists them."""
    for name, found in in_order(_record_or_error, _samples(files, source)):
        if isinstance(found, Exception):
            index["skipped"].append(f"{name}: {found}")
            logging.warning("skipped %s: %s", name, found)
        else:
            index["held_out"] += records.is_held_out(name, index["heldout"])
            yield found


def _record_or_error(sample: _Sample) -> tuple[str, records.Record | Exception]:
    name = str(sample.name)
    try:
        picture, captions = sample.read()
        lines = _captions(captions, sample.name.with_suffix(".txt").name)
        transforms.decode(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
        return name, error
    return name, records.Record(name, picture, lines)


def _captions(text: bytes | None, name: str) -> tuple[str, ...]:
    if text is None:
        raise ValueError(f"has no caption: {name} is missing")
    lines = tuple(line.strip() for line in text.decode("utf-8-sig").split("\n") if line.strip())
    if not lines:
        raise ValueError(f"has no caption: {name} is empty")
    return lines
