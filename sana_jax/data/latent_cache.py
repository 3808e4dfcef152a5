"""Latents of every picture a run will see, computed once: the autoencoder is frozen, so its part of each step is not."""

import fcntl
import hashlib
import os
import pathlib
import secrets
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from sana_jax import atomic
from sana_jax.data import emoji, transforms
from sana_jax.data.picture_set import PictureSet

_BATCH = 128
_LOG_EVERY = 40  # batches


class LatentCache:
    """Unscaled latents in float16, one for each picture on each background that may lie under it.

    A photograph has one version (on white, where it is transparent at all), a drawing one for each background.

    Attributes:
      latents: [versions, h, w, C]; on disk, read as needed.
    """

    def __init__(self, latents: np.ndarray, counts: Sequence[int], backgrounds: Sequence[str]):
        self.latents = latents
        self._counts = np.asarray(counts)
        self._first = np.cumsum([0, *counts[:-1]])
        self._number = {name: number for number, name in enumerate(backgrounds)}

    def __call__(self, indices: Int[np.ndarray, " B"], backgrounds: Sequence[str]) -> Float[np.ndarray, "B h w C"]:
        """Latents of pictures by their number in the set and the background, as a batch of the loader names them."""
        one = self._counts[indices] == 1
        number = np.asarray([self._number.get(name, 0) for name in backgrounds])
        versions = self._first[indices] + np.where(one, 0, number)
        return np.asarray(self.latents[versions], np.float32)


def open_latent_cache(
    folder: str | pathlib.Path,
    pictures: PictureSet,
    backgrounds: Sequence[str],
    encode: Callable[[Float[np.ndarray, "B H W 3"]], np.ndarray],
    weights_digest: str,
    between: Callable[[], None] = lambda: None,
) -> LatentCache:
    """Encodes all versions of all pictures, or reads what an earlier call with the same pictures and weights left.

    The file appears under its name only when it is whole. What an interrupted call left unfinished, the next one goes on
    with.

    Args:
      folder: where the file is kept; its name says which pictures and weights it belongs to.
      pictures: the set.
      backgrounds: the loader's.
      encode: pictures in -1..1 to unscaled latents; called with batches of one size.
      weights_digest: of whatever `encode` depends on; see `digest`.
      between: called after every batch; what it raises ends the call.

    Raises:
      FloatingPointError: a latent does not fit float16.
    """
    below = [("white",) if record.emoji is None else backgrounds for record in pictures.records]
    versions = [(number, name) for number, names in enumerate(below) for name in names]
    pairs = zip(pictures.records, pictures.checksums, strict=True)
    named = "\n".join(f"{record.key} {record.emoji is None} {checksum}" for record, checksum in pairs)
    identity = f"{weights_digest} {pictures.image_size} {','.join(backgrounds)}\n{named}"
    path = pathlib.Path(folder) / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, pictures, versions, encode, between)
    return LatentCache(np.load(path, mmap_mode="r"), [len(names) for names in below], backgrounds)


def digest(arrays) -> str:
    """SHA-256 of a sequence of arrays: their shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for array in map(np.asarray, arrays):
        total.update(f"{array.shape}{array.dtype}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _write(path: pathlib.Path, pictures: PictureSet, versions: Sequence[tuple[int, str]], encode, between) -> None:
    unfinished, lock = _claim(path)
    with lock:
        logging.info("encoding %s pictures to %s, %s done", f"{len(versions):,}", path, f"{_done(unfinished):,}")
        try:
            _encode_all(unfinished, pictures, versions, encode, between)
            unfinished.replace(path)
        except FloatingPointError:
            unfinished.unlink(missing_ok=True)
            raise
        finally:
            if not unfinished.exists():
                _progress(unfinished).unlink(missing_ok=True)


def _claim(path: pathlib.Path) -> tuple[pathlib.Path, BinaryIO]:
    """(an unfinished file of the cache, open and locked): one whose writer has ended, or a new one.

    A writer holds a lock on its file, which ends with its process. Those of other caches that nobody holds are removed.
    """
    mine = None
    for file in sorted(path.parent.glob(".*.npy")):
        lock = _lock(file)
        if lock is None:
            continue
        if mine is None and file.name.startswith(f".{path.stem}."):
            mine = file, lock
            continue
        with lock:
            file.unlink(missing_ok=True)
            _progress(file).unlink(missing_ok=True)
    while mine is None:
        # The random name is nobody else's, whether on this host or on another that shares the folder.
        file = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.npy")
        file.touch()
        lock = _lock(file, needed=False)
        mine = (file, lock) if lock else None
    return mine


def _lock(file: pathlib.Path, needed: bool = True) -> BinaryIO | None:
    """The file, open and locked; None where another process has it. Not `needed`: open where there are no locks."""
    try:
        stream = file.open("r+b")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if needed or isinstance(error, BlockingIOError):
            stream.close()
            return None
    if not (
        file.exists() and os.path.samestat(file.stat(), os.fstat(stream.fileno()))
    ):  # its writer has just finished it
        stream.close()
        return None
    return stream


def _progress(unfinished: pathlib.Path) -> pathlib.Path:
    return unfinished.with_suffix(".done")


def _done(unfinished: pathlib.Path) -> int:
    """How many latents an unfinished file holds."""
    file = _progress(unfinished)
    return int(file.read_text()) if file.is_file() else 0


def _encode_all(file: pathlib.Path, pictures: PictureSet, versions: Sequence[tuple[int, str]], encode, between) -> None:
    first = _done(file)
    out = np.load(file, mmap_mode="r+") if first else None
    for start in range(first, len(versions), _BATCH):
        part = list(versions[start : start + _BATCH])
        full = part + part[-1:] * (_BATCH - len(part))
        rgba = np.stack([pictures.rgba(number) for number, _ in full])
        colours = np.asarray([emoji.BACKGROUNDS[name] for _, name in full], np.uint8)
        latents = np.asarray(encode(transforms.composite(rgba, colours)), np.float32)[: len(part)]
        if not np.abs(latents).max() <= np.finfo(np.float16).max:
            raise FloatingPointError(
                f"{pictures.records[part[0][0]].key} or the {len(part) - 1} after it: latents "
                f"beyond float16 (up to {np.abs(latents).max()}); set train.cache_latents=False"
            )
        if out is None:
            shape = (len(versions), *latents.shape[1:])
            out = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
        out[start : start + len(part)] = latents
        out.flush()  # to the disk, before the progress says so
        atomic.write_file(_progress(file), str(start + len(part)).encode())
        if start // _BATCH % _LOG_EVERY == 0:
            logging.info("encoded %s of %s pictures", f"{start + len(part):,}", f"{len(versions):,}")
        between()
