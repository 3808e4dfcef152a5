"""Named tensors on disk: safetensors files, single or in shards with an index, as diffusers and transformers do."""

import json
import os
import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sana_jax.weights.model_index import read_json

VARIANTS = ("", "bf16", "fp16")  # public folders may hold half-precision copies beside or instead of the plain files


def read_tensors(folder: pathlib.Path, stem: str) -> dict[str, np.ndarray]:
    """Reads `stem`.safetensors, or the shards that `stem`.safetensors.index.json names; bfloat16 through ml_dtypes.

    Raises:
      FileNotFoundError: there is no such file, or a shard is missing.
      ValueError: a file is truncated or damaged; names it.
    """
    for variant in VARIANTS:
        infix = f".{variant}" if variant else ""
        single = folder / f"{stem}{infix}.safetensors"
        index = folder / f"{stem}.safetensors.index{infix}.json"
        if single.is_file():
            return _read_file(single)
        if index.is_file():
            return _read_shards(index)
    raise FileNotFoundError(
        f"{folder} has no {stem}.safetensors and no {stem}.safetensors.index.json; .bin and .pth files are not read."
    )


def write_tensors(
    folder: pathlib.Path, stem: str, tensors: Mapping[str, np.ndarray], *, dtype: str, max_shard_bytes: int
) -> None:
    """Writes what `read_tensors` reads. Each file is complete or absent; files of `stem` from an earlier write go last.

    Args:
      dtype: "float32", "float16" or "bfloat16": what every tensor is cast to.
      max_shard_bytes: more than this is spread over several files, none larger (unless by one tensor).

    Raises:
      ValueError: a tensor holds numbers that `dtype` cannot.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, value in tensors.items():
        value = _cast(name, value, dtype)
        if shards[-1] and size + value.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    single = f"{stem}.safetensors"
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [single]
    folder.mkdir(parents=True, exist_ok=True)
    for name, shard in zip(names, shards, strict=True):
        write_atomically(folder / name, safetensors.numpy.save(shard, {"format": "pt"}))
    if len(shards) > 1:
        total = sum(value.nbytes for shard in shards for value in shard.values())
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(folder / f"{single}.index.json", {"metadata": {"total_size": total}, "weight_map": places})
        names.append(f"{single}.index.json")
    for old in folder.glob(f"{stem}*safetensors*"):
        if old.name not in names:
            old.unlink()


def write_json(file: pathlib.Path, values: Mapping) -> None:
    """Writes an object, readable by people too."""
    write_atomically(file, (json.dumps(values, indent=2) + "\n").encode())


def write_atomically(file: pathlib.Path, content: bytes) -> None:
    """Under its name, the file is the old one or the whole new one, never a part of it."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _read_file(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is truncated or damaged: {error}. Fetch or write it again."
        ) from error


def _read_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
    places = read_json(index).get("weight_map", {})
    shards = sorted(set(places.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if not shards:
        raise ValueError(f"{index} names no shard at all; it has an empty weight_map.")
    if missing:
        raise FileNotFoundError(f"{index} names {', '.join(missing)}, which the folder lacks. Fetch the shards again.")
    tensors = {}
    for shard in shards:
        tensors |= _read_file(index.parent / shard)
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise ValueError(f"{index} promises {', '.join(absent[:5])}, which no shard holds. Fetch the shards again.")
    return tensors


def _cast(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    value = np.asarray(value)
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(value.astype(jnp.dtype(dtype)))
    if not np.isfinite(cast.astype(np.float32)).all():
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"{name} is not finite and is not written; the run it comes from has diverged.")
        raise ValueError(f"{name} exceeds the range of {dtype}. Use dtype='float32' or 'bfloat16'.")
    return cast
