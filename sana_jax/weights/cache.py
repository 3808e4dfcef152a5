"""Converted weights on disk: our own stacked layout, in one safetensors file per part and dtype.

Reading it is one contiguous read per parameter, without the transposition of every layer's tensors. The file's name carries
a digest of what it was made from, so that a changed source, key table or dtype makes another file.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from flax import traverse_util

from sana_jax import atomic
from sana_jax.weights import layout
from sana_jax.weights.stored import Adapted, StoredTensor
from sana_jax.weights.tensor_files import STORED_DTYPES, open_file, safetensors_header

VERSION = 1  # to be raised when a `Form`, which the digest cannot see, changes its meaning
_BLOCKS, _BLOCK_BYTES = 64, 16_384  # of a source file, read for the digest: 1 MB


def converted(
    directory: str | pathlib.Path,
    name: str,
    entries: Sequence[layout.Entry],
    tensors: Mapping,
    abstract_params,
    dtype: str,
    files: Sequence[pathlib.Path],
    where: str,
) -> tuple[list[layout.Entry], dict]:
    """Key table and tensors of the converted file, which is written first where it is not there or is damaged.

    Args:
      directory: of the converted files; made where it does not exist.
      name: of the part.
      entries, tensors, abstract_params: as `layout.read`, after `layout.check`.
      dtype: of the converted parameters.
      files: that the tensors are read from.
      where: the source, for the log.

    Raises:
      ValueError: a source file is damaged, or dtype is not one that is stored.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"cache_dir: dtype={dtype!r} is not one of {', '.join(STORED_DTYPES)}.")
    file = pathlib.Path(directory) / f"{name}-{dtype}-{_digest(entries, tensors, files, dtype)}.safetensors"
    shapes = {path: tuple(x.shape) for path, x in traverse_util.flatten_dict(abstract_params, sep="/").items()}
    own = [layout.Entry(entry.path, (entry.path,)) for entry in entries]
    if file.is_file():
        try:
            return own, open_file(file)
        except ValueError as error:
            logging.warning("%s; it is converted anew from %s.", error, where)
    logging.info("%s: writing the converted weights to %s", where, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    element = STORED_DTYPES[dtype]
    header = safetensors_header({entry.path: (shapes[entry.path], element) for entry in entries}, {"source": where})

    def content():
        yield header
        for entry in entries:
            value = entry.gather(tensors, shapes[entry.path], element)
            yield memoryview(value.reshape(-1).view(np.uint8))

    atomic.write_file(file, content())
    return own, open_file(file)


def _digest(entries: Sequence[layout.Entry], tensors: Mapping, files: Sequence[pathlib.Path], dtype: str) -> str:
    """Of all that the converted numbers follow from; of the source's own, samples stand for the whole."""
    facts = {
        "version": VERSION,
        "table": [[e.path, e.names, e.layers, e.axis, e.join] for e in entries],
        "tensors": [[name, *_tensor_facts(tensor)] for name, tensor in sorted(tensors.items())],
        "files": [_file_facts(file) for file in sorted(files)],
        "dtype": dtype,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _tensor_facts(tensor: StoredTensor | Adapted | np.ndarray) -> list:
    """Where a tensor is; of one that is in memory (of an old `.pth` file) its numbers."""
    if isinstance(tensor, Adapted):
        return [*map(_tensor_facts, (tensor.base, tensor.down, tensor.up)), tensor.scale]
    if isinstance(tensor, StoredTensor):
        place = [tensor.file.name, tensor.offset]
    else:
        place = [hashlib.sha256(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)).hexdigest()]
    return [*place, list(tensor.shape), tensor.dtype.name]


def _file_facts(file: pathlib.Path) -> list:
    """Name, size and time, which two models can have in common, and a digest of blocks all over the file."""
    facts = file.stat()
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        for number in range(_BLOCKS):
            stream.seek(max(facts.st_size - _BLOCK_BYTES, 0) * number // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    return [file.name, facts.st_size, facts.st_mtime_ns, digest.hexdigest()]
