"""One picture with its text as one record, and shards of them: ArrayRecord files that are read in any order.

A record is

    "SJR1" | CRC-32 of what follows (uint32) | length of the header (uint32) | header (UTF-8 JSON) | picture file

with little-endian integers. The picture stays the file it was (WebP, PNG, JPEG). A shard is written uncompressed (the
pictures are compressed already) in groups of one record, so that reading one record reads nothing else. Beside the
shards lies `dataset.json`: which shards there are, with counts and sources. Where each picture has one that guides a
ControlNet, these are the set control/ in the set's folder: the same records with those pictures.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python import array_record_module

from sana_jax import atomic
from sana_jax.data.threads import in_order

MAGIC = b"SJR1"
INDEX = "dataset.json"
CONTROL = "control"  # the set of the pictures that guide
SHARD_BYTES = 4 * 10**9  # then a new shard begins: few open files, and yet many for hosts to share the reading
_PREFIX = struct.Struct("<4sII")
_CHECKED_FROM = 8  # the checksum covers everything behind itself
_READ_AT_ONCE = 8


class CorruptRecord(ValueError):
    """A record whose bytes are not what was written."""


class FileSystemError(OSError):
    """A file could not be read, for a reason that may pass."""


class NoRecords(ValueError):
    """A set was to be written of nothing."""


@dataclasses.dataclass(frozen=True)
class Emoji:
    """What is known of an emoji drawing.

    Attributes:
      style: who drew it, e.g. "noto".
      codepoints: lower-case hex joined by "-", without variation selectors, e.g. "1f468-200d-1f373".
      label: its name, e.g. "man cook".
      tags: keywords, e.g. ("chef", "cook").
      group: its Unicode group, e.g. "people-body".
    """

    style: str
    codepoints: str
    label: str
    tags: tuple[str, ...] = ()
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Record:
    """A picture file and what is said of it: captions (photographs), or an emoji's description.

    Attributes:
      key: unique in its set, e.g. "1f34e/noto" or "holidays/beach.jpg".
      picture: the picture file's bytes.
      captions: sentences that describe it, one of which is drawn at a time.
      scores: how well each fits, None where nobody scored it (`caption_files`); empty where none has one.
      emoji: for emoji artwork, from which captions are made.
      control: the file of the picture that guides a ControlNet, to be written; it is read from a set of its own.
    """

    key: str
    picture: bytes
    captions: tuple[str, ...] = ()
    scores: tuple[float | None, ...] = ()
    emoji: Emoji | None = None
    control: bytes = b""


def describe(record: Record) -> dict:
    """A record without its picture, as JSON has it."""
    header: dict = {"key": record.key}
    if record.captions:
        header["captions"] = list(record.captions)
    if record.scores:
        header["scores"] = list(record.scores)
    if record.emoji is not None:
        header["emoji"] = dataclasses.asdict(record.emoji)
    return header


def from_description(header: dict, picture: bytes = b"") -> Record:
    """The record that `describe` describes."""
    emoji = header.get("emoji")
    if emoji is not None:
        emoji = Emoji(**{**emoji, "tags": tuple(emoji["tags"])})
    return Record(header["key"], picture, tuple(header.get("captions", ())), tuple(header.get("scores", ())), emoji)


def encode(record: Record) -> bytes:
    """Record -> bytes, in the form at the top of this file; equal records give equal bytes."""
    text = json.dumps(describe(record), ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    body = struct.pack("<I", len(text)) + text + record.picture
    return MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def decode(data: bytes) -> Record:
    """Bytes -> record. Raises as `split`."""
    header, picture = split(data)
    return from_description(json.loads(header), picture)


def split(data: bytes) -> tuple[bytes, bytes]:
    """Bytes of a record -> (its header, its picture file).

    Raises:
      CorruptRecord: too short, of another kind, or a checksum that does not match.
    """
    if len(data) < _PREFIX.size:
        raise CorruptRecord(f"{len(data)} bytes are fewer than the {_PREFIX.size} of a record's prefix")
    magic, checksum, length = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise CorruptRecord(f"begins with {magic!r}, a record begins with {MAGIC!r}")
    if zlib.crc32(memoryview(data)[_CHECKED_FROM:]) != checksum:
        raise CorruptRecord("its checksum does not match its bytes")
    return data[_PREFIX.size : _PREFIX.size + length], data[_PREFIX.size + length :]


class _SetWriter:
    """Writes records to ArrayRecord files of about `SHARD_BYTES`."""

    def __init__(self, folder: Path):
        self._folder, self._shards, self._writer = folder, [], None

    def add(self, record: Record) -> None:
        if self._writer is None:
            self._file = self._folder / f"pictures-{len(self._shards):05d}.array_record"
            self._writer = array_record_module.ArrayRecordWriter(str(self._file), "group_size:1,uncompressed")
            self._count = self._size = 0
        data = encode(record)
        with self._told():
            self._writer.write(data)
        self._count, self._size = self._count + 1, self._size + len(data)
        if self._size >= SHARD_BYTES:
            self._close_file()

    def close(self, index: dict) -> dict:
        """Writes `dataset.json`, which says `index` and which files there are; returns what it says."""
        if self._writer is not None:
            self._close_file()
        index = {**index, "shards": self._shards}
        (self._folder / INDEX).write_text(json.dumps(index, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return index

    def _close_file(self) -> None:
        with self._told():
            self._writer.close()
        self._writer = None
        size = self._file.stat().st_size
        self._shards.append({"file": self._file.name, "records": self._count, "bytes": size})

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Full disks and the like are RuntimeErrors of array_record."""
        try:
            yield
        except RuntimeError as error:
            raise OSError(f"{self._file.name} of the set cannot be written: {error}") from error


def write_dataset(output: Path, records: Iterable[Record], index: dict, *, overwrite: bool = False) -> dict:
    """Writes a set's folder (shards and `dataset.json`) so that it exists whole or not at all.

    Args:
      output: the folder; it must not exist, or be empty, or with `overwrite` be a set.
      records: in the order to be kept; all with a picture that guides, or none.
      index: what `dataset.json` says besides `shards`.

    Returns:
      What was written to `dataset.json`.

    Raises:
      NoRecords: there is not one to write.
      ValueError: `output` holds files (with `overwrite`: of something else).
    """
    output = Path(output)
    check_output(output, overwrite)
    with atomic.new_folder(output) as folder:
        pictures, control = _SetWriter(folder), None
        for record in records:
            pictures.add(record)
            if record.control:
                if control is None:
                    (folder / CONTROL).mkdir()
                    control = _SetWriter(folder / CONTROL)
                control.add(dataclasses.replace(record, picture=record.control))
        written = pictures.close(index)
        if not written["shards"]:
            raise NoRecords(f"no record to write to {output}")
        if control is not None:
            control.close(index)
    return written


def check_output(output: Path, overwrite: bool) -> None:
    """Raises ValueError where a set cannot be put, or would destroy something: with `overwrite`, anything but a set."""
    if os.path.ismount(output):
        raise ValueError(f"{output} is a mount point, which no folder can replace; give one inside it, as {output}/set")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{output} exists and is not an empty folder; remove it, or pass --overwrite")
    try:
        read_index(output)
    except (FileNotFoundError, ValueError):
        raise ValueError(
            f"--overwrite: {output} is no data set (it has no {INDEX} of one) and is not deleted; remove it yourself"
        ) from None


def is_held_out(key: str, share: float) -> bool:
    """Whether a photograph is among the `share` of its set that training never sees: a function of its key alone."""
    return zlib.crc32(key.encode()) < share * 2**32


def read_index(path: Path) -> dict:
    """Reads `dataset.json`.

    Raises:
      FileNotFoundError: there is none; the message says how a set is made.
      ValueError: it is damaged, or of something else.
    """
    index = Path(path) / INDEX
    if not os.path.isfile(index):  # false where it may not be looked at, too
        raise FileNotFoundError(
            f"{path} is not a data set: it has no {INDEX}. Make one with "
            f"`python -m sana_jax.data build folder --input PICTURES --output {path}` (or `build emoji`)."
        )
    found = json.loads(index.read_text(encoding="utf-8"))
    shards = found.get("shards") if isinstance(found, dict) else None
    if not isinstance(shards, list) or not all({"file", "records", "bytes"} <= set(shard) for shard in shards):
        raise ValueError(
            f"{index} is not of a data set: it names no shards. Build one with `python -m sana_jax.data build`."
        )
    return found


class Place(NamedTuple):
    """Where a record stands: a shard and its number in it; number is None for the shard as a whole."""

    shard: Path
    number: int | None

    def __str__(self) -> str:
        return f"{self.shard}" if self.number is None else f"{self.shard}[{self.number}]"


def open_shard(path: Path) -> array_record_module.ArrayRecordReader:
    """A reader for single records in any order; several threads may use it at once."""
    return array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")


def read_one(reader: array_record_module.ArrayRecordReader, number: int) -> bytes:
    """The bytes of one record.

    Raises:
      FileSystemError, CorruptRecord: by what array_record says, which has RuntimeError for both.
    """
    try:
        return reader.read(number, number + 1)[0]  # read([number]) looks through the numbers of all records
    except RuntimeError as error:
        raise (FileSystemError if _is_of_file_system(error) else CorruptRecord)(str(error)) from error


def _is_of_file_system(error: Exception) -> bool:
    """Whether an error of array_record's names a call of the system that failed."""
    return re.match(r"\w+\(\) failed: ", str(error)) is not None


def read_dataset(path: Path) -> Iterator[tuple[Place, Record | Exception]]:
    """Yields every record of a set with its place, in order; where one cannot be read, the error instead of it."""
    for shard in read_index(path)["shards"]:
        yield from read_shard(path, shard, decode)


def read_shard(path: Path, shard: dict, take: Callable[[bytes], Any]) -> Iterator[tuple[Place, Any]]:
    """Yields what `take` makes of each record of a shard, with its place, in order; where one cannot be read, the error.

    A shard that cannot be opened gives one error. Several records are read at once, a few of which memory holds.

    Args:
      path: the set's folder.
      shard: what `dataset.json` says of the shard.
      take: of a record's bytes, called by several threads.

    Raises:
      FileSystemError: which says nothing of the records.
    """
    file = Path(path) / shard["file"]
    try:
        if not file.is_file():
            raise FileNotFoundError("the file is missing")
        reader = open_shard(file)
        count = reader.num_records()
        if not reader.ok():
            reader.close()  # raises what is wrong
        if count != shard["records"]:
            raise ValueError(f"holds {count} records, {INDEX} says {shard['records']}")
    except Exception as error:  # array_record raises plain RuntimeError, IndexError and ValueError
        if _is_of_file_system(error):
            raise FileSystemError(f"{file}: {error}") from error
        yield Place(file, None), error
        return
    starts = range(0, count, _READ_AT_ONCE)
    several = (range(start, min(start + _READ_AT_ONCE, count)) for start in starts)
    for start, found in zip(starts, in_order(functools.partial(_take_some, reader, take), several), strict=True):
        yield from ((Place(file, start + number), one) for number, one in enumerate(found))
    reader.close()


def _take_some(reader, take: Callable[[bytes], Any], numbers: range) -> list[Any | Exception]:
    return [_take_or_error(reader, take, number) for number in numbers]


def _take_or_error(reader, take: Callable[[bytes], Any], number: int) -> Any | Exception:
    try:
        return take(read_one(reader, number))
    except FileSystemError:
        raise
    except Exception as error:  # whatever a damaged record makes of JSON
        return error
