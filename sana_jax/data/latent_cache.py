"""Latents of every picture a run will see, computed once: the autoencoder is frozen, so its part of each step is not.

FOLDER/NAME/00000.npy, 00001.npy, ... hold CHUNK latents each, and NAME says of which pictures, size and weights. A file is there
whole or not at all. So what is there is done: any number of processes share the work, the next call goes on where one was
interrupted, and two calls at once do some of it twice, which is all.
"""

import functools
import hashlib
import io
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int, UInt8

from sana_jax import atomic
from sana_jax.data import emoji, transforms
from sana_jax.data.picture_set import PictureSet
from sana_jax.parallel import multihost

CHUNK = 512  # latents in a file: 32 MB of 1024x1024 pixels
_READS_AT_ONCE = 16  # a file server answers after milliseconds
_LOG_EVERY = 30.0  # seconds
_PATIENCE = 60.0  # seconds until a network's file system shows what another host wrote


class LatentCache:
    """Unscaled latents in float16, one for each picture on each background that may lie under it.

    A photograph has one version (on white, where it is transparent at all), a drawing one for each background.

    Attributes:
      folder: where they are.
    """

    def __init__(self, folder: pathlib.Path, counts: Int[np.ndarray, " N"], backgrounds: Sequence[str]):
        """`folder`: see the module; `counts`: versions of each picture of the set, in order."""
        self.folder, self._counts = folder, counts
        self._first = np.cumsum(counts) - counts
        self._number = {name: number for number, name in enumerate(backgrounds)}

    def __len__(self) -> int:
        """Versions of all pictures."""
        return int(self._counts.sum())

    def __call__(self, indices: Int[np.ndarray, " B"], backgrounds: Sequence[str]) -> Float[np.ndarray, "B h w C"]:
        """Latents of pictures by their number in the set and the background, as a batch of the loader names them."""
        number = np.asarray([self._number.get(name, 0) for name in backgrounds])
        versions = self._first[indices] + np.where(self._counts[indices] == 1, 0, number)
        return np.stack(list(_readers().map(self._read, versions.tolist()))).astype(np.float32)

    def _read(self, version: int) -> Float[np.ndarray, "h w C"]:
        start, shape, dtype = self._form
        number, size = version % CHUNK, math.prod(shape) * dtype.itemsize
        with self.file(version // CHUNK).open("rb") as file:
            file.seek(start + number * size)
            return np.frombuffer(file.read(size), dtype).reshape(shape)

    @functools.cached_property
    def _form(self) -> tuple[int, tuple[int, ...], np.dtype]:
        """Where the latents of every file begin, and shape and dtype of each."""
        latents = np.load(self.file(0), mmap_mode="r")
        return latents.offset, latents.shape[1:], latents.dtype

    def file(self, chunk: int) -> pathlib.Path:
        """Where latents CHUNK * chunk and those after it are."""
        return self.folder / f"{chunk:05d}.npy"

    def missing(self) -> list[int]:
        """Numbers of the files that are not there."""
        # One question for all of them.
        there = {entry.name for entry in os.scandir(self.folder)} if self.folder.is_dir() else set()
        return [chunk for chunk in range(-(-len(self) // CHUNK)) if self.file(chunk).name not in there]


@functools.cache
def _readers() -> ThreadPoolExecutor:
    """The threads that read latents, of whatever size."""
    return ThreadPoolExecutor(_READS_AT_ONCE, "latents")


def open_latent_cache(
    folder: str | pathlib.Path,
    pictures: PictureSet,
    backgrounds: Sequence[str],
    encode: Callable[[UInt8[np.ndarray, "B H W 3"]], Float[Array | np.ndarray, "B h w C"]],
    weights_digest: str,
    batch_size: int = 128,
    between: Callable[[], None] = lambda: None,
) -> LatentCache:
    """Latents of all versions of all pictures; what is not there yet is encoded, by all processes, which must all call it.

    Args:
      folder: seen by all processes; a folder in it is made for these pictures and weights.
      pictures: the set.
      backgrounds: the loader's.
      encode: pictures to unscaled latents, on this process's own devices; called with `batch_size` pictures.
      weights_digest: of whatever `encode` depends on; see `digest`.
      between: called after every batch, equally often in every process; what it raises ends the call.

    Raises:
      ValueError: a latent does not fit float16.
      FileNotFoundError: what another process wrote is not to be seen here.
    """
    versions = _Versions(pictures, backgrounds)
    path = pathlib.Path(folder) / _name(pictures, backgrounds, weights_digest)
    cache = LatentCache(path, versions.counts, backgrounds)
    missing = multihost.from_first(cache.missing() if multihost.is_first() else [])
    if missing:
        path.mkdir(parents=True, exist_ok=True)
        _encode_missing(cache, missing, versions, encode, batch_size, between)
    _wait_for(cache.missing)
    return cache


def digest(arrays) -> str:
    """SHA-256 of a sequence of arrays: their shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for array in map(np.asarray, arrays):
        total.update(f"{array.shape}{array.dtype}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _name(pictures: PictureSet, backgrounds: Sequence[str], weights_digest: str) -> str:
    height, width = pictures.size
    size = height if height == width else f"{height}x{width}"
    total = hashlib.sha256(f"{weights_digest} {CHUNK} {size} {','.join(backgrounds)}".encode())
    total.update(pictures.checksums.tobytes() + pictures.drawn.tobytes())
    return total.hexdigest()[:16]


class _Versions:
    """Every picture on every background that it is to be drawn on, by number."""

    def __init__(self, pictures: PictureSet, backgrounds: Sequence[str]):
        self.counts = np.where(pictures.drawn, len(backgrounds), 1)
        self._pictures = pictures
        self._colours = np.asarray([emoji.BACKGROUNDS[name] for name in backgrounds], np.uint8)
        self._picture = np.repeat(np.arange(len(pictures)), self.counts)
        self._background = np.arange(len(self._picture)) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)

    def __call__(self, version: int) -> UInt8[np.ndarray, "H W 3"]:
        """The picture."""
        number = self._picture[version]
        drawn = self._pictures.drawn[number]
        colour = self._colours[self._background[version]] if drawn else emoji.BACKGROUNDS["white"]
        return transforms.composite(self._pictures.rgba(int(number)), np.asarray(colour, np.uint8))

    def key(self, version: int) -> str:
        return self._pictures.records[self._picture[version]].key


def _encode_missing(
    cache: LatentCache, missing: list[int], versions: _Versions, encode: Callable, batch_size: int, between: Callable
) -> None:
    """Every process encodes one of the files, and waits for the others before the next."""
    processes, process = jax.process_count(), jax.process_index()
    batches = multihost.highest(-(-CHUNK // batch_size))  # processes may have different numbers of devices
    work = _encoded(cache, missing[process::processes], versions, encode, batch_size, batches)
    folder = cache.file(0).parent
    logging.info("encoding about %s of %s pictures to %s", f"{_latents(cache, missing):,}", f"{len(cache):,}", folder)
    said = time.monotonic()
    for first in range(0, len(missing), processes):
        for _ in range(batches):
            next(work, None)
            between()
        multihost.barrier("latents")
        done, to_do = missing[first : first + processes], missing[first + processes :]
        _wait_for(lambda: [chunk for chunk in done if not cache.file(chunk).is_file()])
        if time.monotonic() > said + _LOG_EVERY:
            said = time.monotonic()
            logging.info(
                "about %s of %s pictures are still to encode", f"{_latents(cache, to_do):,}", f"{len(cache):,}"
            )


def _encoded(
    cache: LatentCache, chunks: list[int], versions: _Versions, encode: Callable, batch_size: int, batches: int
) -> Iterator[None]:
    """Encodes and writes these files; yields after every batch, `batches` times for a file however short it is."""
    files = [range(CHUNK * chunk, min(CHUNK * (chunk + 1), len(cache))) for chunk in chunks]
    parts = [file[batch_size * number : batch_size * (number + 1)] for file in files for number in range(batches)]
    with ThreadPoolExecutor() as pool:
        ahead, latents = [pool.submit(versions, version) for version in parts[0]] if parts else [], []
        for number, part in enumerate(parts):
            images = [future.result() for future in ahead]
            following = parts[number + 1] if number + 1 < len(parts) else ()
            ahead = [pool.submit(versions, version) for version in following]  # decoded while these are encoded
            if part:
                images += images[-1:] * (batch_size - len(images))
                latents.append(_as_float16(encode(np.stack(images)), part, versions))
            if (number + 1) % batches == 0:
                _write(cache.file(chunks[number // batches]), np.concatenate(latents))
                latents = []
            yield


def _as_float16(latents: Float[Array | np.ndarray, "B h w C"], part: range, versions: _Versions) -> np.ndarray:
    own = np.asarray(latents, np.float32)[: len(part)]
    if not np.abs(own).max() <= np.finfo(np.float16).max:
        raise ValueError(
            f"{versions.key(part[0])} or the {len(part) - 1} after it: latents beyond float16 (up to {np.abs(own).max()}); "
            "set train.cache_latents=False"
        )
    return own.astype(np.float16)


def _write(file: pathlib.Path, latents: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, latents)
    atomic.write_file(file, content.getvalue())


def _latents(cache: LatentCache, chunks: list[int]) -> int:
    return min(CHUNK * len(chunks), len(cache))


def _wait_for(missing: Callable[[], list[int]]) -> None:
    """Until none of the files is missing, which the others have written."""
    end = time.monotonic() + _PATIENCE
    while chunks := missing():
        if time.monotonic() > end:
            raise FileNotFoundError(
                f"{len(chunks)} files of latents, which other processes have, are not to be seen in this one (the first is "
                f"number {chunks[0]}); --workdir must be a folder that all hosts see."
            )
        time.sleep(1)
