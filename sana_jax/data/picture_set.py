"""An opened data set: the records of one split, without those that cannot be read, and their decoded pictures."""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8

from sana_jax.data import records, transforms
from sana_jax.data.emoji import is_held_out
from sana_jax.data.scan import Scanned, scan

SPLITS = ("train", "heldout", "all")
_LISTED = 20  # so many of the skipped pictures are logged by name


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """The usable pictures of a split.

    Attributes:
      path: the set's folder.
      records: what is said of each picture; `picture` is emptied.
      checksums: CRC-32 of each picture's file.
      skipped: "WHERE: why" for each picture that could not be read.
      image_size: side of the decoded pictures.
    """

    path: Path
    records: Sequence[records.Record]
    checksums: Sequence[int]
    skipped: Sequence[str]
    image_size: int
    _decoded: np.ndarray | None
    _places: Sequence[records.Place]
    _shards: Mapping[Path, Any]

    def __len__(self) -> int:
        return len(self.records)

    def digest(self) -> str:
        """Of all picture files, in order."""
        return hashlib.sha256(np.asarray(self.checksums, np.uint32).tobytes()).hexdigest()[:16]

    def rgba(self, number: int) -> UInt8[np.ndarray, "S S 4"]:
        """The decoded picture of a record: from memory, or from the file where the set is too large for that."""
        if self._decoded is not None:
            return self._decoded[number]
        place = self._places[number]
        try:
            return _read_picture(self._shards, place, self.image_size)
        except Exception as error:
            raise ValueError(f"{place} ({self.records[number].key}) can no longer be read: {error}") from error


def open_set(path: str | Path = "", *, split: str = "train", image_size: int, cache_mb: int = 4096) -> PictureSet:
    """Opens a set and checks every record of the split.

    Unreadable records are counted, logged and skipped. Pictures are decoded once and kept in memory if that takes at
    most `cache_mb`; otherwise only checksums are compared here, and each picture is decoded when it is wanted.

    Args:
      path: a folder that `python -m sana_jax.data build` made; empty: the embedded emoji set.
      split: "train" (without what is held out: pairs of the emoji, a share of a folder's pictures), "heldout" (only that)
        or "all".
      image_size: side of the decoded pictures.
      cache_mb: memory for decoded pictures, in units of 10^6 bytes.

    Raises:
      FileNotFoundError: `path` is no set.
      ValueError: an unknown split, or not one picture that can be used.
    """
    if image_size < 1:
        raise ValueError(f"image_size={image_size} is not a size in pixels; use 1 or more")
    path = Path(path) if path else embedded_path()
    scanned, found = _of_split(path, split)
    skipped = [f"{item.place}: {item.record}" for item in scanned if isinstance(item.record, Exception)]
    readable = [item for item in scanned if not isinstance(item.record, Exception)]
    total, others = len(scanned), len(readable) - len(found)
    shards = {shard: records.open_shard(shard) for shard in {item.place.shard for item in found}}
    decoded = None
    if len(found) * image_size**2 * 4 <= cache_mb * 10**6:
        decoded, good = _decode_all(found, shards, image_size, skipped)
        found = [found[i] for i in good]
    if skipped:
        logging.warning(
            "%s: skipped %d of %d pictures:\n  %s%s",
            path,
            len(skipped),
            total,
            "\n  ".join(skipped[:_LISTED]),
            f"\n  and {len(skipped) - _LISTED} more" if len(skipped) > _LISTED else "",
        )
    if not found:
        first = f"; the first unreadable one is {skipped[0]}" if skipped else ""
        raise ValueError(
            f"{path} has no usable picture for split={split!r}: of {total} records {len(skipped)} are unreadable and "
            f"{others} belong to another split{first}"
        )
    return PictureSet(
        path,
        records=[item.record for item in found],
        checksums=[item.checksum for item in found],
        skipped=skipped,
        image_size=image_size,
        _decoded=decoded,
        _places=[item.place for item in found],
        _shards=shards if decoded is None else {},
    )


def count_records(path: str | Path, split: str) -> int:
    """How many records of a split can be read; no picture is decoded. Raises as `open_set`."""
    return len(_of_split(Path(path) if path else embedded_path(), split)[1])


def embedded_path() -> Path:
    """The emoji set that comes with the package."""
    return Path(__file__).parents[1] / "assets" / "emoji"


def _of_split(path: Path, split: str) -> tuple[list[Scanned], list[Scanned]]:
    """(all records of a set, those of a split that can be read)."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
    share = records.read_index(path).get("heldout", 0.0)
    scanned = scan(path)
    readable = [item for item in scanned if not isinstance(item.record, Exception)]
    return scanned, [
        item for item in readable if split == "all" or _held_out(item.record, share) == (split == "heldout")
    ]


def _held_out(record: records.Record, share: float) -> bool:
    if record.emoji is None:
        return records.is_held_out(record.key, share)
    return is_held_out(record.emoji.codepoints, record.emoji.style)


def _read_picture(shards: Mapping[Path, Any], place: records.Place, image_size: int) -> UInt8[np.ndarray, "S S 4"]:
    record = records.decode(shards[place.shard].read([place.number])[0])
    return transforms.resize_and_crop(transforms.decode(record.picture), image_size)


def _decode_all(
    found: Sequence[Scanned], shards: Mapping[Path, Any], image_size: int, skipped: list[str]
) -> tuple[UInt8[np.ndarray, "N S S 4"], list[int]]:
    """All pictures that decode, in order, and which ones these are; the others go to `skipped`."""
    decoded = np.empty((len(found), image_size, image_size, 4), np.uint8)

    def one(number: int) -> Exception | None:
        try:
            decoded[number] = _read_picture(shards, found[number].place, image_size)
        except Exception as error:  # whatever a broken file makes Pillow raise
            return error
        return None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        errors = list(pool.map(one, range(len(found))))
    skipped.extend(f"{f.place} ({f.record.key}): {e}" for f, e in zip(found, errors, strict=True) if e)
    good = [number for number, error in enumerate(errors) if error is None]
    return (decoded if len(good) == len(found) else decoded[good]), good
