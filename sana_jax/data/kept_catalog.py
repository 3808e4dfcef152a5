"""The catalog of a large set in files, which all processes of a job make together and later starts open.

WORKDIR/data/NAME/rows.npy and headers.jsonl, the two fields of a `catalog.Part`; NAME follows from the sizes and times of the set's
files, and from the form of a row. Until they are there, each shard that was read has two such files of its own. The rows come
last: what they say is there.
"""

import hashlib
import io
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from absl import logging

from sana_jax import atomic
from sana_jax.data import catalog, records
from sana_jax.data.catalog import Part
from sana_jax.parallel import multihost

KEPT_FROM = 10**9  # bytes; what is smaller every process reads by itself, in seconds
_LOG_EVERY = 30.0  # seconds
_PATIENCE = 60.0  # seconds until a network's file system shows what another host wrote


def read_together(path: Path, folder: Path, between: Callable[[], None] = lambda: None) -> None:
    """Makes the catalog of a set, if it has more than `KEPT_FROM` bytes, for `catalog.open_catalog`; all processes must call it.

    Each reads every so many-th shard. Where that was interrupted, the next call goes on. A process that does not see what
    the others wrote, because its set or its `folder` is another, reads everything by itself.

    Args:
      path: the set's folder.
      folder: in which a folder is made for this set.
      between: called as often as in every other process; what it raises ends the call.

    Raises:
      FileNotFoundError: `path` is no set.
    """
    size = sum(shard["bytes"] for shard in records.read_index(path)["shards"])
    if size < KEPT_FROM:
        return
    name = hashlib.sha256(repr((catalog.stamp(path)[1:], catalog.ROW.descr)).encode()).hexdigest()[:16]
    kept = _Kept(path, folder / name)
    found = kept.open()
    if not multihost.on_all(found is not None):
        logging.info("reading all of %s (%.1f GB), and keeping what is found in %s", path, size / 1e9, folder / name)
        kept.read_shards(between, needed=found is None)
        multihost.barrier("pictures read")
        if multihost.is_first() and found is None:
            found = kept.join()
        multihost.barrier("catalog written")
        number = int(name[:7], 16)
        patience = _PATIENCE if multihost.from_first([number]) == [number] else 0
        found = found or kept.wait(patience) or kept.join()
    catalog.remember(path, found, sized=True)


class _Kept:
    """The files of one set's catalog."""

    def __init__(self, path: Path, folder: Path):
        self._path, self._folder = path, folder
        self._shards = range(len(catalog.shard_files(path)))

    def open(self) -> Part | None:
        """The whole catalog; None where it is not there, or damaged."""
        rows, text = self._files()
        return Part(np.load(rows, mmap_mode="r"), np.memmap(text, np.uint8, "r")) if _is_whole(rows, text) else None

    def wait(self, seconds: float) -> Part | None:
        """The whole catalog, which another process writes."""
        end = time.monotonic() + seconds
        while (found := self.open()) is None and time.monotonic() < end:
            time.sleep(1)
        return found

    def read_shards(self, between: Callable[[], None], needed: bool) -> None:
        """Reads this process's share of the shards, if needed; takes as many turns as every other process."""
        first, step, said = jax.process_index(), jax.process_count(), time.monotonic()
        for turn in range(0, len(self._shards), step):
            if needed and turn + first in self._shards:
                self._read_shard(turn + first)
            between()
            if time.monotonic() > said + _LOG_EVERY:
                said = time.monotonic()
                logging.info("%d of %d files are read", min(turn + step, len(self._shards)), len(self._shards))

    def join(self) -> Part:
        """Puts all shards together, reading those that nobody read, and removes their own files."""
        for number in self._shards:
            if (found := self.open()) is not None:  # another process of this host was faster, and removed them
                return found
            self._read_shard(number)
        files = [self._files(number) for number in self._shards]
        try:
            self._write(
                catalog.join_rows([np.load(rows) for rows, _ in files]), (text.read_bytes() for _, text in files)
            )
        except FileNotFoundError:
            if (found := self.open()) is not None:  # another process of this host was faster
                return found
            raise
        for file in itertools.chain.from_iterable(files):
            file.unlink(missing_ok=True)
        return self.open()

    def _read_shard(self, number: int) -> None:
        if not _is_whole(*self._files(number)):
            part = catalog.read_shard(self._path, number, sized=True)
            self._write(part.rows, [part.text], number)

    def _write(self, rows: np.ndarray, text: Iterable[bytes], shard: int | None = None) -> None:
        rows_file, text_file = self._files(shard)
        content = io.BytesIO()
        np.save(content, rows)
        self._folder.mkdir(parents=True, exist_ok=True)
        atomic.write_file(text_file, text)
        atomic.write_file(rows_file, content.getvalue())

    def _files(self, shard: int | None = None) -> tuple[Path, Path]:
        """(rows, text) of the whole set, or of one shard."""
        part = "" if shard is None else f"-{shard:05d}"
        return self._folder / f"rows{part}.npy", self._folder / f"headers{part}.jsonl"


def _is_whole(rows_file: Path, text_file: Path) -> bool:
    """Whether both are there, and as long as they say."""
    if not (rows_file.is_file() and text_file.is_file()):
        return False
    try:
        rows, size = np.load(rows_file, mmap_mode="r"), text_file.stat().st_size
        if rows.dtype != catalog.ROW or not len(rows) or rows["end"][-1] != size:
            raise ValueError(f"{text_file.name} has {size} bytes, and not what the rows say")
    except (ValueError, OSError, EOFError) as error:
        logging.warning("%s is damaged (%s), and is made again", rows_file, error)
        return False
    return True
