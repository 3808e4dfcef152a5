"""What EfficientNet-Lite0 sees in pictures, as vectors; computed once per picture and kept on disk."""

import hashlib
import io
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, UInt8

from sana_jax import atomic
from sana_jax.models.efficientnet import EfficientNetLite0
from sana_jax.weights import efficientnet as weights

# Pictures are enlarged to this side. The network learnt on 224; 128 takes a third of the time.
_SIDE = 128
_BATCH = 64
_LAYOUT_SIDE = 8
_VERSION = 1  # to be raised where the same pictures shall give other vectors


class Features(NamedTuple):
    """Vectors of N pictures, float32.

    Attributes:
      pooled: the 1280 features before the classifier.
      stages: mean and standard deviation of every channel of every stage's map.
      layout: the picture itself at 8x8.
    """

    pooled: Float[np.ndarray, "N 1280"]
    stages: Float[np.ndarray, "N 1568"]
    layout: Float[np.ndarray, "N 192"]


def extract(pictures: UInt8[np.ndarray, "N H W 3"]) -> Features:
    """Features of pictures, from disk where the same pictures were seen before and the file can be read.

    They are kept in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)/sana_jax/features, named by the SHA-256 of the
    pictures and of the network's weights; the folder can be deleted at any time.

    Raises:
      ModuleNotFoundError: the network's weights are not installed.
    """
    file = _cache_folder() / f"{_digest(pictures)}.npz"
    if file.is_file():
        try:
            return _read(file)
        except Exception as error:  # NumPy raises eight kinds for damaged files, tokenize.TokenError among them
            logging.warning("%s cannot be read and is made again: %r", file, error)
    features = _compute(pictures)
    _store(file, features)
    return features


def _compute(pictures: UInt8[np.ndarray, "N H W 3"]) -> Features:
    params = weights.load()
    parts = []
    for first in range(0, len(pictures), _BATCH):
        batch = pictures[first : first + _BATCH]
        filled = np.zeros((_BATCH, *batch.shape[1:]), np.uint8)  # one shape, one compiled program
        filled[: len(batch)] = batch
        parts.append([np.asarray(part)[: len(batch)] for part in _network(params, filled)])
        logging.log_every_n_seconds(
            logging.INFO, "features of %d of %d pictures", 30, first + len(batch), len(pictures)
        )
    # float16 as on disk, so that the first run and later ones see the same numbers
    return Features(*(np.concatenate(part).astype(np.float16).astype(np.float32) for part in zip(*parts, strict=True)))


@jax.jit
def _network(params, pictures: UInt8[Array, "B H W 3"]) -> Features:
    x = pictures.astype(jnp.float32) / 127.5 - 1
    layout = jax.image.resize(x, (len(x), _LAYOUT_SIDE, _LAYOUT_SIDE, 3), "linear")
    out = EfficientNetLite0().apply({"params": params}, jax.image.resize(x, (len(x), _SIDE, _SIDE, 3), "cubic"))
    stages = [moment(feature_map, axis=(1, 2)) for feature_map in out.maps for moment in (jnp.mean, jnp.std)]
    return Features(out.pooled, jnp.concatenate(stages, axis=-1), layout.reshape(len(x), -1))


def _digest(pictures: UInt8[np.ndarray, "N H W 3"]) -> str:
    digest = hashlib.sha256(f"{_VERSION} {_SIDE} {pictures.shape} ".encode())
    digest.update(weights.find().read_bytes())
    digest.update(np.ascontiguousarray(pictures))
    return digest.hexdigest()


def _cache_folder() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(home) if home else pathlib.Path.home() / ".cache") / "sana_jax" / "features"


def _read(file: pathlib.Path) -> Features:
    with np.load(file) as stored:
        return Features(*(stored[name].astype(np.float32) for name in Features._fields))


def _store(file: pathlib.Path, features: Features) -> None:
    """Writes the file whole or not at all; a disk that is full or read-only costs the cache only."""
    content = io.BytesIO()
    np.savez(content, **{name: value.astype(np.float16) for name, value in features._asdict().items()})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_file(file, [content.getbuffer()])
    except OSError as error:
        logging.warning("features are not kept in %s: %s", file.parent, error)
