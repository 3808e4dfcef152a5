"""An opened data set: the records of one split, without those that cannot be read, and their decoded pictures.

Pictures of several aspect ratios are one `PictureSet` for each size that they are brought to.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import math
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Int, Shaped, UInt8, UInt32

from sana_jax.aspect_ratios import Bucket, buckets_of
from sana_jax.data import catalog, records, transforms

SPLITS = ("train", "heldout", "all")
_LISTED = 20  # so many of the skipped pictures are logged by name
_WAITS = (1, 5, 25)  # seconds
_ROWS_AT_ONCE = 2**20  # of a hundred million, whose ratios would take gigabytes
_OPEN_SHARDS = 512  # each is an open file, of which a process often may have 1,024


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """The usable pictures of a split, or those of them that are brought to one size.

    Attributes:
      path: the set's folder.
      skipped: "WHERE: why" for each picture of the set, of whatever split and size, that could not be read.
      size: (height, width) of the decoded pictures.
      control: the pictures that guide a ControlNet, by the same numbers; None where they were not asked for.
    """

    path: Path
    skipped: Sequence[str]
    size: tuple[int, int]
    _catalog: catalog.Catalog
    _indices: Int[np.ndarray, " N"]
    _decoded: UInt8[np.ndarray, "N H W 4"] | None
    _open: Callable[[Path], Any]
    control: "PictureSet | None" = None

    def __len__(self) -> int:
        return len(self._indices)

    @functools.cached_property
    def records(self) -> Sequence[records.Record]:
        """What is said of each picture; `picture` is empty."""
        return catalog.Records(self._catalog, self._indices)

    @functools.cached_property
    def drawn(self) -> Bool[np.ndarray, " N"]:
        """Whether each is a drawing, for any background, and no photograph."""
        return self.column("drawn")

    @functools.cached_property
    def checksums(self) -> UInt32[np.ndarray, " N"]:
        """CRC-32 of each picture's file."""
        return self.column("checksum")

    def column(self, name: str) -> Shaped[np.ndarray, " N"]:
        """A field of `catalog.ROW` for each picture."""
        return self._catalog.rows[name][self._indices]

    def rgba(self, number: int) -> UInt8[np.ndarray, "H W 4"]:
        """The decoded picture of a record: from memory, or from the file where the set is too large for that.

        Raises:
          FileSystemError: the file cannot be read now; another start may help.
          ValueError: the record is not what it was when the set was opened, or no picture.
        """
        if self._decoded is not None:
            return self._decoded[number]
        index = int(self._indices[number])
        place = self._catalog.place(index)
        try:
            return _read_picture(self._open, self._catalog, index, self.size)
        except records.FileSystemError:
            raise
        except Exception as error:
            raise ValueError(f"{place} ({self.records[number].key}) can no longer be read: {error}") from error


def open_set(path: str | Path = "", *, split: str = "train", image_size: int, cache_mb: int = 4096) -> PictureSet:
    """`open_sets` for squares of `image_size` pixels, which is 1 or more."""
    if image_size < 1:
        raise ValueError(f"image_size={image_size} is not a size in pixels; use 1 or more")
    return open_sets(path, split=split, buckets=buckets_of((1.0,), image_size), cache_mb=cache_mb)[0]


def open_sets(
    path: str | Path = "", *, split: str = "train", buckets: Sequence[Bucket], cache_mb: int = 4096
) -> tuple[PictureSet, ...]:
    """Opens a set, checks every record of the split, and gives each picture to the bucket of the nearest ratio.

    Unreadable records are counted, logged and skipped. Pictures are decoded once and kept in memory if that takes at
    most `cache_mb`; otherwise only checksums are compared here, and each picture is decoded when it is wanted.

    Args:
      path: a folder that `python -m sana_jax.data build` made; empty: the embedded emoji set.
      split: "train" (without what is held out: pairs of the emoji, a share of a folder's pictures), "heldout" (only that)
        or "all".
      buckets: sizes of the decoded pictures, from wide to tall.
      cache_mb: memory for decoded pictures, in units of 10^6 bytes.

    Returns:
      A set for each bucket that has pictures, in the order of `buckets`.

    Raises:
      FileNotFoundError: `path` is no set.
      ValueError: an unknown split, or not one picture that can be used.
    """
    path = Path(path) if path else embedded_path()
    found = catalog.open_catalog(path, sized=len(buckets) > 1)
    indices = _of_split(found, split)
    unreadable = np.flatnonzero(~found.rows["readable"]).tolist()
    skipped = [f"{found.place(index)}: {found.error(index)}" for index in unreadable]
    total, others = len(found.rows), len(found.rows) - len(unreadable) - len(indices)
    open_shard = functools.lru_cache(_OPEN_SHARDS)(records.open_shard)
    parts = _by_bucket(found.rows, indices, buckets)
    decode = sum(len(own) * math.prod(size) for size, own in parts.items()) * 4 <= cache_mb * 10**6
    sets = []
    for size, own in parts.items():
        decoded = None
        if decode:
            decoded, good = _decode_all(found, own, open_shard, size, skipped)
            own = own[good]
        if len(own):
            sets.append(PictureSet(path, skipped, size, found, own, decoded, open_shard))
    if decode:
        open_shard.cache_clear()
    if skipped:
        logging.warning(
            "%s: skipped %d of %d pictures:\n  %s%s",
            path,
            len(skipped),
            total,
            "\n  ".join(skipped[:_LISTED]),
            f"\n  and {len(skipped) - _LISTED} more" if len(skipped) > _LISTED else "",
        )
    if not sets:
        first = f"; the first unreadable one is {skipped[0]}" if skipped else ""
        raise ValueError(
            f"{path} has no usable picture for split={split!r}: of {total} records {len(skipped)} are unreadable and "
            f"{others} belong to another split{first}"
        )
    if len(buckets) > 1:
        counts = ", ".join(f"{len(each):,} of {each.size[0]}x{each.size[1]}" for each in sets)
        logging.info("%s: pictures by height x width: %s", path, counts)
    return tuple(sets)


def with_control(sets: Sequence[PictureSet]) -> tuple[PictureSet, ...]:
    """The sets of a folder, each with the pictures that guide a ControlNet, decoded and kept in memory as its own are.

    Raises:
      FileNotFoundError: the folder has none.
      ValueError: they are not those of the pictures, or one cannot be read.
    """
    path = control_path(sets[0].path)
    found, open_shard = catalog.open_catalog(path), functools.lru_cache(_OPEN_SHARDS)(records.open_shard)
    guiding = []
    for each in sets:
        rows, own = found.rows["header_checksum"], each._indices
        same = len(rows) == len(each._catalog.rows) and np.array_equal(rows[own], each.column("header_checksum"))
        if not same or not found.rows["readable"][own].all():
            raise ValueError(_not_guiding(path, found, each))
        skipped, decoded = [], None
        if each._decoded is not None:
            decoded, _ = _decode_all(found, own, open_shard, each.size, skipped)
        if skipped:
            raise ValueError(
                f"{path} has pictures that cannot be decoded; build the set again:\n  " + "\n  ".join(skipped)
            )
        guiding.append(PictureSet(path, [], each.size, found, own, decoded, open_shard))
    return tuple(dataclasses.replace(each, control=control) for each, control in zip(sets, guiding, strict=True))


def _not_guiding(path: Path, found: catalog.Catalog, pictures: PictureSet) -> str:
    unreadable = np.flatnonzero(~found.rows["readable"]).tolist()[:_LISTED]
    shown = "".join(f"\n  {found.place(index)}: {found.error(index)}" for index in unreadable) or " none"
    return (
        f"{path} does not hold the pictures that guide those of {pictures.path}, record for record ({len(found.rows):,} for "
        f"{len(pictures._catalog.rows):,}). Restore the set, or build it again. Unreadable now:{shown}"
    )


def control_path(path: Path) -> Path:
    """The set of the pictures that guide those of the set at `path`. Raises FileNotFoundError where there is none."""
    found = path / records.CONTROL
    if not (found / records.INDEX).is_file():
        raise FileNotFoundError(
            f"{path} has no pictures that guide a ControlNet. Build it with `python -m sana_jax.data build folder --control ...`, from "
            "X.png with X.control.png."
        )
    return found


def digest(sets: Sequence[PictureSet], of: str = "checksum") -> str:
    """Of all picture files, in order, or of what is said of them (`of` = "header_checksum")."""
    total = hashlib.sha256()
    for each in sets:
        if len(sets) > 1 or each.size[0] != each.size[1]:
            total.update(f"{each.size} {len(each)} ".encode())  # which has which size decides on the batches
        total.update(each.column(of).tobytes())
    return total.hexdigest()[:16]


def count_records(path: str | Path, split: str) -> int:
    """How many records of a split can be read; no picture is decoded. Raises as `open_set`."""
    return len(_of_split(catalog.open_catalog(Path(path) if path else embedded_path()), split))


def embedded_path() -> Path:
    """The emoji set that comes with the package."""
    return Path(__file__).parents[1] / "assets" / "emoji"


def _of_split(found: catalog.Catalog, split: str) -> Int[np.ndarray, " N"]:
    """Which records of a set are of a split and can be read."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
    wanted = found.rows["readable"].copy()
    if split != "all":
        wanted &= found.rows["held_out"] == (split == "heldout")
    return np.flatnonzero(wanted)


def _by_bucket(
    rows: np.ndarray, indices: Int[np.ndarray, " N"], buckets: Sequence[Bucket]
) -> dict[tuple[int, int], Int[np.ndarray, " M"]]:
    """For each bucket's size, which of `indices` have its ratio; a picture whose sides are not known counts as square.

    The buckets are from wide to tall.
    """
    if len(buckets) == 1:
        return {buckets[0].size: indices}
    labels = np.asarray([bucket.ratio for bucket in buckets])
    nearest = np.empty(len(indices), np.uint8)
    for first in range(0, len(indices), _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        height, width = (rows[side][indices[some]] for side in ("height", "width"))
        ratios = np.divide(height, width, out=np.ones(len(height)), where=width > 0)
        nearest[some] = np.searchsorted((labels[1:] + labels[:-1]) / 2, ratios)
    return {bucket.size: indices[nearest == number] for number, bucket in enumerate(buckets)}


def _read_picture(
    open_shard: Callable[[Path], Any], found: catalog.Catalog, index: int, size: tuple[int, int]
) -> UInt8[np.ndarray, "H W 4"]:
    record = records.decode(_read_patiently(open_shard, found.place(index)))
    if zlib.crc32(record.picture) != found.rows["checksum"][index]:
        raise ValueError("another picture stands there by now; the set was replaced")
    return transforms.resize_and_crop(transforms.decode(record.picture), size)


def _read_patiently(open_shard: Callable[[Path], Any], place: records.Place) -> bytes:
    """The bytes of a record; a file system that fails is asked again for half a minute."""
    for seconds in _WAITS:
        try:
            return records.read_one(open_shard(place.shard), place.number)
        except records.FileSystemError as error:
            logging.warning("%s cannot be read (%s); tried again in %d s", place, error, seconds)
            open_shard.cache_clear()  # it may have to be opened anew
            time.sleep(seconds)
    return records.read_one(open_shard(place.shard), place.number)


def _decode_all(
    found: catalog.Catalog,
    indices: Int[np.ndarray, " N"],
    open_shard: Callable[[Path], Any],
    size: tuple[int, int],
    skipped: list[str],
) -> tuple[UInt8[np.ndarray, "M H W 4"], list[int]]:
    """All pictures that decode, in order, and which of `indices` these are; the others go to `skipped`."""
    decoded = np.empty((len(indices), *size, 4), np.uint8)

    def one(number: int) -> Exception | None:
        try:
            decoded[number] = _read_picture(open_shard, found, int(indices[number]), size)
        except records.FileSystemError:
            raise
        except Exception as error:  # whatever a broken file makes Pillow raise
            return error
        return None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        errors = list(pool.map(one, range(len(indices))))
    for index, error in zip(indices.tolist(), errors, strict=True):
        if error:
            skipped.append(f"{found.place(index)} ({found.record(index).key}): {error}")
    good = [number for number, error in enumerate(errors) if error is None]
    return (decoded if len(good) == len(indices) else decoded[good]), good
