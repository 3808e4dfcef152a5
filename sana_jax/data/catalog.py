"""What is in a set, without its pictures: a table of numbers and one text, made by reading every record once.

There is no object of a record until somebody asks for it. The catalog of a hundred million pictures takes some ten GB; where it
is kept in files (`kept_catalog`) these are mapped, so that memory holds what is looked at, and processes of a host share it.
"""

import functools
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sana_jax.data import emoji, records, transforms

WHOLE_SHARD = -1

# Of a record: its shard and its number there (WHOLE_SHARD: the shard cannot be read), CRC-32 of its picture's file and of its
# header, that picture's sides (`transforms.size_of`; 0 where nobody asked), where its line in the text ends; and whether it can
# be read, is a drawing (`Record.emoji`), and is held out from training.
ROW = np.dtype(
    [
        ("shard", np.uint32),
        ("number", np.int32),
        ("checksum", np.uint32),
        ("header_checksum", np.uint32),
        ("height", np.uint32),
        ("width", np.uint32),
        ("end", np.uint64),
        ("readable", np.bool_),
        ("drawn", np.bool_),
        ("held_out", np.bool_),
    ]
)


class Part(NamedTuple):
    """Records in order.

    Attributes:
      rows: a `ROW` of each.
      text: a line of JSON for each: the header of the record, or a string that says why it cannot be read. Bytes, or an
        array of them.
    """

    rows: np.ndarray
    text: Any


class Catalog:
    """All records of a set, in order.

    Attributes:
      rows: a `ROW` of each.
      sized: whether these have the pictures' sides, which take three times as long as all else.
    """

    def __init__(self, shards: Sequence[Path], part: Part, sized: bool):
        self.rows, self._text, self.sized = np.asarray(part.rows), memoryview(part.text), sized
        self._ends, self._shards = self.rows["end"], shards

    def place(self, index: int) -> records.Place:
        """Where a record stands."""
        shard, number = self.rows[index][["shard", "number"]].tolist()
        return records.Place(self._shards[shard], None if number == WHOLE_SHARD else number)

    def record(self, index: int) -> records.Record:
        """A record that can be read, with an empty `picture`."""
        return records.from_description(self._line(index))

    def error(self, index: int) -> str:
        """Why a record cannot be read."""
        return self._line(index)

    def _line(self, index: int) -> Any:
        start = int(self._ends[index - 1]) if index else 0
        try:
            return json.loads(bytes(self._text[start : int(self._ends[index])]))
        except ValueError as error:
            raise ValueError(
                f"what a start before this one kept of {self.place(index)} is damaged ({error}). Remove data/ of WORKDIR, or of "
                "train.cache_folder; it is made again."
            ) from error


class Records(Sequence):
    """Some records of a catalog, each made when it is asked for, with an empty `picture`."""

    def __init__(self, catalog: Catalog, indices: Int[np.ndarray, " N"]):
        self._catalog, self._indices = catalog, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: int | np.integer) -> records.Record:
        return self._catalog.record(int(self._indices[number]))


# Of the latest sets: a run opens its own for training, pictures held out and a tokenizer, and one of pictures that guide.
_known: dict[tuple, Catalog] = {}
_KNOWN = 2


def open_catalog(path: Path, sized: bool = False) -> Catalog:
    """The catalog of a set, `sized` if asked for; a second call reads nothing unless a file of the set has changed.

    Raises:
      FileNotFoundError: `path` is no set.
    """
    known = _known.get(stamp(path))
    if known is not None and known.sized >= sized:
        return known
    parts = [read_shard(path, number, sized) for number in range(len(shard_files(path)))]
    whole = Part(join_rows([part.rows for part in parts]), b"".join(part.text for part in parts))
    return remember(path, whole, sized)


def remember(path: Path, part: Part, sized: bool) -> Catalog:
    """Makes these rows what `open_catalog` finds."""
    for old in [key for key in _known if key[0] == path] or list(_known)[: len(_known) + 1 - _KNOWN]:
        del _known[old]
    _known[stamp(path)] = catalog = Catalog(shard_files(path), part, sized)
    return catalog


def shard_files(path: Path) -> list[Path]:
    """The files of a set's shards."""
    return [path / shard["file"] for shard in records.read_index(path)["shards"]]


def stamp(path: Path) -> tuple:
    """Changes when a file of the set does."""
    files = [file for file in (path / records.INDEX, *shard_files(path)) if file.is_file()]
    return (path, *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def read_shard(path: Path, number: int, sized: bool) -> Part:
    """Reads all records of a set's shard, with their pictures' sides if asked for."""
    index = records.read_index(path)
    shard, describe = index["shards"][number], functools.partial(_describe, index.get("heldout", 0.0), sized)
    rows, lines, end = np.zeros(max(shard["records"], 1), ROW), [], 0
    for row, (place, found) in enumerate(records.read_shard(path, shard, describe)):
        readable = not isinstance(found, Exception)
        line, *facts = found if readable else (json.dumps(str(found)).encode(), 0, (0, 0), False, False)
        lines.append(line + b"\n")
        end += len(line) + 1
        checksum, size, drawn, held_out = facts
        at = WHOLE_SHARD if place.number is None else place.number
        rows[row] = (number, at, checksum, zlib.crc32(line), *size, end, readable, drawn, held_out)
    return Part(rows[: len(lines)], b"".join(lines))


def _describe(share: float, sized: bool, data: bytes) -> tuple[bytes, int, tuple[int, int], bool, bool]:
    """(header, CRC-32 of the picture's file, its sides, whether it is a drawing, is held out) of a record's bytes."""
    header, picture = records.split(data)
    record = records.from_description(json.loads(header))
    if record.emoji is None:
        held_out = records.is_held_out(record.key, share)
    else:
        held_out = emoji.is_held_out(record.emoji.codepoints, record.emoji.style)
    size = transforms.size_of(picture) if sized else (0, 0)
    return bytes(header), zlib.crc32(picture), size, record.emoji is not None, held_out


def join_rows(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of parts whose texts are to follow each other."""
    rows = np.concatenate(parts)
    lengths = [int(part["end"][-1]) if len(part) else 0 for part in parts]
    rows["end"] += np.repeat(np.cumsum([0, *lengths[:-1]], dtype=np.uint64), [len(part) for part in parts])
    return rows
