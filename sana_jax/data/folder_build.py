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
_CONTROL = ".control"
_CONTROLS = tuple(_CONTROL + suffix for suffix in _SUFFIXES)
_RATIO_ERROR = 0.02  # by which the two pictures' height / width may differ: a row or two of small ones


def build(
    source: Path,
    output: Path,
    *,
    heldout: float = 0.0,
    min_score: float = 0.0,
    control: bool = False,
    overwrite: bool = False,
) -> dict:
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
      control: with each picture also X.control.png (or .jpg, .jpeg, .webp) is kept, which is to guide a ControlNet, of the same height /
        width; a picture without one is skipped. Otherwise such files are passed over.
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
    beside = _Beside(found, control)
    files = [path for path in found if path.suffix.lower() != caption_files.JSON and not _is_control(path)]
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


class _Files(NamedTuple):
    """What there is of a picture; `control` is the file of the one that guides, None where that is not asked for."""

    picture: bytes
    captions: caption_files.Captions
    control: bytes | None


class _Sample(NamedTuple):
    """A picture that may be one for the set: its name within the folder, and `read`, which raises what is wrong with it."""

    name: PurePosixPath
    read: Callable[[], _Files]


class _Beside:
    """What stands beside pictures and tar files in a folder tree; `controlled`: also pictures that guide."""

    def __init__(self, paths: list[Path], controlled: bool):
        self.texts = caption_files.SideFiles(path for path in paths if path.suffix.lower() == caption_files.JSON)
        self.controlled = controlled
        self._control = {path.with_suffix("").with_suffix(""): path for path in paths if _is_control(path)}

    def control_of(self, picture: Path) -> bytes | None:
        """The file of the picture that guides, if there is one."""
        path = self._control.get(picture.with_suffix(""))
        return None if path is None else path.read_bytes()


def _is_control(path: Path) -> bool:
    return path.name.lower().endswith(_CONTROLS)


def _samples(files: list[Path], beside: _Beside, source: Path) -> Iterator[_Sample]:
    for file in files:
        name = PurePosixPath(file.relative_to(source).as_posix())
        if file.suffix.lower() == _TAR:
            yield from _samples_of_tar(file, name, beside)
        else:
            yield _Sample(name, functools.partial(_read_files, file, beside))


def _samples_of_tar(file: Path, name: PurePosixPath, beside: _Beside) -> Iterator[_Sample]:
    try:
        texts_of_all = beside.texts.of(file)
        with tarfile.open(file, "r:") as tar:
            for key, members in itertools.groupby(
                filter(tarfile.TarInfo.isfile, tar), lambda member: _parts(member)[0]
            ):
                found = {_parts(member)[1]: member for member in members}
                wanted = (*_SUFFIXES, *_TEXTS, *_CONTROLS)
                files = {suffix: tar.extractfile(found[suffix]).read() for suffix in wanted if suffix in found}
                pictures = {suffix: files.pop(suffix) for suffix in _SUFFIXES if suffix in files}
                control = next((files[suffix] for suffix in _CONTROLS if suffix in files), None)
                for suffix, picture in pictures.items():
                    own = picture, PurePosixPath(key).name, key, files, texts_of_all, control, beside.controlled
                    yield _Sample(name / found[suffix].name, functools.partial(_gather, *own))
                for suffix, member in found.items() if not pictures else ():
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


def _read_files(picture: Path, beside: _Beside) -> _Files:
    files = {suffix: picture.with_suffix(suffix) for suffix in _TEXTS}
    texts = {suffix: file.read_bytes() for suffix, file in files.items() if file.is_file()}
    control = beside.control_of(picture) if beside.controlled else None
    stem = picture.stem
    return _gather(picture.read_bytes(), stem, stem, texts, beside.texts.of(picture), control, beside.controlled)


def _gather(
    picture: bytes, stem: str, key: str, texts: dict, beside: list, control: bytes | None, controlled: bool
) -> _Files:
    if controlled and control is None:
        raise ValueError(f"has no picture that guides: {stem}{_CONTROLS[0]} is missing")
    return _Files(picture, caption_files.gather(stem, key, texts, beside), control if controlled else None)


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
        picture, captions, control = sample.read()
        transforms.decode(picture)
        if control is not None:
            transforms.decode(control)
            _check_ratios(picture, control)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
        return name, error
    return name, records.Record(name, picture, captions.texts, captions.scores, control=control or b"")


def _check_ratios(picture: bytes, control: bytes) -> None:
    sizes = [transforms.size_of(each) for each in (picture, control)]
    ratios = [height / width for height, width in sizes]
    if abs(ratios[0] / ratios[1] - 1) > _RATIO_ERROR:
        shown = [f"{height}x{width}" for height, width in sizes]
        raise ValueError(f"is {shown[0]} and the picture that guides it {shown[1]}; they have to be of one shape")
