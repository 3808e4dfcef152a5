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
      for theirs, "highest_score" that of any caption, "unmatched_scores" the pictures with scores of captions that they do not
      have, "skipped" lists "FILE: why".

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
    files = [path for path in found if path.suffix.lower() != caption_files.JSON and not _is_control(path)]
    beside = _Beside(found, files, control)
    if not files:
        raise ValueError(f"{source} holds no picture ({', '.join('*' + suffix for suffix in (*_SUFFIXES, _TAR))})")
    for file in files:
        if file.suffix.lower() == _TAR:
            beside.texts.of(file)  # of all its pictures, so that a mistake is told before anything is written
    skipped: list[str] = []
    index = {"kind": "folder", "source": source.name, "heldout": heldout, "skipped": skipped}
    index |= {"held_out": 0, "scored": 0, "low_score": 0, "highest_score": 0.0, "unmatched_scores": 0}
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

    def __init__(self, paths: list[Path], owners: list[Path], controlled: bool):
        self.texts = caption_files.SideFiles(
            [path for path in paths if path.suffix.lower() == caption_files.JSON], owners
        )
        self.controlled = controlled
        self._controls: dict[Path, list[Path]] = {}
        for path in paths if controlled else ():
            if _is_control(path):
                self._controls.setdefault(path.with_suffix("").with_suffix(""), []).append(path)
        alone = self._controls.keys() - {owner.with_suffix("") for owner in owners}
        if alone:
            logging.warning("%d pictures guide none that is there, %s.control.* among them", len(alone), min(alone))

    def controls_of(self, picture: Path) -> list[bytes]:
        """The files of the pictures that guide it."""
        return [path.read_bytes() for path in self._controls.get(picture.with_suffix(""), ())]


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
                controls = [files[suffix] for suffix in _CONTROLS if suffix in files] if beside.controlled else None
                for suffix, picture in pictures.items():
                    own = picture, PurePosixPath(key).name, key, files, texts_of_all, controls
                    yield _Sample(name / found[suffix].name, functools.partial(_gather, *own))
                for suffix, member in found.items() if not pictures else ():
                    if suffix.endswith(_SUFFIXES):
                        reason = f"is taken for a file {suffix!r}: names in a tar end at their first dot"
                        yield _Sample(name / member.name, functools.partial(_fail, reason))
            _check_end(file, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        yield _Sample(name, functools.partial(_fail, f"can be read no further: {error}"))


def _check_end(file: Path, offset: int) -> None:
    """Raises a TarError where no empty block stands after the last member: tarfile takes a damaged header for the end."""
    with file.open("rb") as stream:
        stream.seek(offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"the header at byte {offset} is damaged, or the file was cut off there")


def _parts(member: tarfile.TarInfo) -> tuple[str, str]:
    """(name up to its first dot, the rest in small letters)"""
    folder, slash, name = member.name.rpartition("/")
    stem, dot, suffix = name.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix.lower()}"


def _read_files(picture: Path, beside: _Beside) -> _Files:
    files = {suffix: picture.with_suffix(suffix) for suffix in _TEXTS}
    texts = {suffix: file.read_bytes() for suffix, file in files.items() if file.is_file()}
    controls, stem = beside.controls_of(picture) if beside.controlled else None, picture.stem
    return _gather(picture.read_bytes(), stem, stem, texts, beside.texts.of(picture), controls)


def _gather(picture: bytes, stem: str, key: str, texts: dict, beside: list, controls: list[bytes] | None) -> _Files:
    """`controls`: the pictures that guide it, of which there has to be one; None: none is asked for."""
    if controls is not None and len(controls) != 1:
        if controls:
            raise ValueError(f"has {len(controls)} pictures that guide, {stem}{_CONTROL}.*; leave one")
        raise ValueError(f"has no picture that guides: {stem}{_CONTROLS[0]} is missing")
    return _Files(picture, caption_files.gather(stem, key, texts, beside), controls[0] if controls else None)


def _fail(reason: str):
    raise ValueError(reason)


def _read(samples: Iterator[_Sample], min_score: float, index: dict) -> Iterator[records.Record]:
    """The records, while `index` counts and lists them."""
    for name, found, unmatched in in_order(_record_or_error, samples):
        if isinstance(found, Exception):
            index["skipped"].append(f"{name}: {found}")
            logging.warning("skipped %s: %s", name, found)
            continue
        if unmatched:
            index["unmatched_scores"] += 1
            if index["unmatched_scores"] == 1:
                logging.warning("%s has scores of %s, and no captions of these names", name, ", ".join(unmatched))
        best = max(filter(None, found.scores), default=0.0)
        index["highest_score"] = max(index["highest_score"], best)
        if found.scores and best < min_score:
            index["low_score"] += 1
            continue
        index["held_out"] += records.is_held_out(name, index["heldout"])
        index["scored"] += bool(found.scores)
        yield found


def _record_or_error(sample: _Sample) -> tuple[str, records.Record | Exception, tuple[str, ...]]:
    """(its name, the record or what is wrong with it, names of scores without a caption)"""
    name = str(sample.name)
    try:
        picture, captions, control = sample.read()
        decoded = transforms.decode(picture)
        if control is not None:
            _check_ratios(decoded.size, transforms.decode(control).size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
        return name, error, ()
    record = records.Record(name, picture, captions.texts, captions.scores, control=control or b"")
    return name, record, captions.unmatched


def _check_ratios(picture: tuple[int, int], control: tuple[int, int]) -> None:
    """Raises ValueError where two pictures of these sizes (width, height) are not of one shape."""
    ratios = [height / width for width, height in (picture, control)]
    if abs(ratios[0] / ratios[1] - 1) > _RATIO_ERROR:
        shown = [f"{height}x{width}" for width, height in (picture, control)]
        raise ValueError(f"is {shown[0]} and the picture that guides it {shown[1]}; they have to be of one shape")
