"""What is in a set, without its pictures: every record is read once, and what was found kept for later starts."""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import logging

from sana_jax import atomic
from sana_jax.data import records

KEPT_FROM = 10**9  # bytes; what is smaller is read in seconds


class Scanned(NamedTuple):
    """A record of a set without its picture, or why it cannot be read.

    Attributes:
      place: where it stands.
      record: with an empty `picture`; or the error.
      checksum: CRC-32 of the picture's file; 0 where there is an error.
    """

    place: records.Place
    record: records.Record | Exception
    checksum: int


_known: dict[tuple, list[Scanned]] = {}  # of one set: a run opens it for training, pictures held out and a tokenizer


def scan(path: Path, kept: Path | None = None) -> list[Scanned]:
    """Every record of a set, in order; a second call reads nothing unless a file of the set has changed.

    Args:
      path: the set's folder.
      kept: folder for a file with what was found in a set of more than `KEPT_FROM` bytes, which later processes read in
        the pictures' place. Its name follows from the sizes and times of the set's files. None: none is written or read.

    Raises:
      FileNotFoundError: `path` is no set.
    """
    stamp = (path, *_stamp(path))
    if stamp not in _known:
        size = sum(shard["bytes"] for shard in records.read_index(path)["shards"])
        found = _read_all(path) if kept is None or size < KEPT_FROM else _read_kept(path, stamp, kept)
        _known.clear()
        _known[stamp] = found
    return _known[stamp]


def _stamp(path: Path) -> Iterator[tuple[str, int, int]]:
    for name in (records.INDEX, *(shard["file"] for shard in records.read_index(path)["shards"])):
        if (path / name).is_file():
            facts = (path / name).stat()
            yield name, facts.st_size, facts.st_mtime_ns


def _read_all(path: Path) -> list[Scanned]:
    found = []
    for place, record in records.read_dataset(path):
        if isinstance(record, Exception):
            found.append(Scanned(place, record, 0))
        else:
            found.append(Scanned(place, dataclasses.replace(record, picture=b""), zlib.crc32(record.picture)))
    return found


def _read_kept(path: Path, stamp: tuple, kept: Path) -> list[Scanned]:
    file = kept / f"{hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]}.jsonl"
    if file.is_file():
        try:
            return [_from_line(path, line) for line in file.read_text(encoding="utf-8").splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            logging.warning("%s is damaged (%s), and is made again", file, error)
    logging.info("reading all of %s, and keeping what is found in %s", path, file)
    found = _read_all(path)
    kept.mkdir(parents=True, exist_ok=True)
    atomic.write_file(file, map(functools.partial(_to_line, path), found))
    return found


def _to_line(path: Path, item: Scanned) -> bytes:
    place = [item.place.shard.relative_to(path).as_posix(), item.place.number]
    if isinstance(item.record, Exception):
        values = {"place": place, "error": str(item.record)}
    else:
        values = {"place": place, "checksum": item.checksum, "record": records.describe(item.record)}
    return json.dumps(values).encode() + b"\n"


def _from_line(path: Path, line: str) -> Scanned:
    values = json.loads(line)
    shard, number = values["place"]
    place = records.Place(path / shard, number)
    if "error" in values:
        return Scanned(place, records.CorruptRecord(values["error"]), 0)
    return Scanned(place, records.from_description(values["record"]), values["checksum"])
