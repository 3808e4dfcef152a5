"""Latents of every picture a run will see, computed once: the autoencoder is frozen, so its part of each step is not."""

import hashlib
import pathlib
import secrets
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging
from jaxtyping import Float, Int

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
) -> LatentCache:
    """Encodes all versions of all pictures, or reads what an earlier call with the same pictures and weights left.

    The file appears under its name only when it is whole.

    Args:
      folder: where the file is kept; its name says which pictures and weights it belongs to.
      pictures: the set.
      backgrounds: the loader's.
      encode: pictures in -1..1 to unscaled latents; called with batches of one size.
      weights_digest: of whatever `encode` depends on; see `digest`.

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
        _write(path, pictures, versions, encode)
    return LatentCache(np.load(path, mmap_mode="r"), [len(names) for names in below], backgrounds)


def digest(arrays) -> str:
    """SHA-256 of a sequence of arrays: their shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for array in map(np.asarray, arrays):
        total.update(f"{array.shape}{array.dtype}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _write(path: pathlib.Path, pictures: PictureSet, versions: Sequence[tuple[int, str]], encode) -> None:
    logging.info("encoding %s pictures to %s", f"{len(versions):,}", path)
    # The random name is nobody else's, whether on this host or on another that shares the folder.
    unfinished = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.npy")
    try:
        _encode_all(unfinished, pictures, versions, encode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _encode_all(file: pathlib.Path, pictures: PictureSet, versions: Sequence[tuple[int, str]], encode) -> None:
    out = None
    for start in range(0, len(versions), _BATCH):
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
        if start // _BATCH % _LOG_EVERY == 0:
            logging.info("encoded %s of %s pictures", f"{start + len(part):,}", f"{len(versions):,}")
    out.flush()  # to the disk too
