"""Named tensors on disk: safetensors files, single or in shards with an index, as diffusers and transformers do.

A safetensors file is an uint64 n, n bytes of JSON (name -> dtype, shape, byte range) and the tensors one after the other.
The header alone says whether the file is whole, so files are checked before any tensor is read.
"""

import itertools
import json
import math
import pathlib
from collections.abc import Collection, Iterator, Mapping

import ml_dtypes
import numpy as np

from sana_jax import atomic
from sana_jax.weights.model_index import check_fetched, read_json
from sana_jax.weights.stored import StoredTensor

VARIANTS = ("", "bf16", "fp16")  # public folders may hold half-precision copies beside or instead of the plain files


DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
STORED_DTYPES = {"float32": DTYPES["F32"], "float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"]}
_MAX_HEADER = 10**8  # of the format
Spec = tuple[tuple[int, ...], np.dtype]  # shape and dtype of a tensor in a file


def open_tensors(folder: pathlib.Path, stem: str) -> dict[str, StoredTensor]:
    """The tensors of `stem`.safetensors, or of the shards that `stem`.safetensors.index.json names.

    The plain files are preferred to a half-precision copy (VARIANTS) beside them, but not an index of shards that are not there.
    Only headers are read.

    Raises:
      FileNotFoundError: there is no such file, or a shard is missing.
      ValueError: a file is truncated or damaged; names it.
    """
    for file in weight_files(folder, stem).values():
        return _open_shards(file) if file.suffix == ".json" else open_file(file)
    raise FileNotFoundError(
        f"{folder} has no {stem}.safetensors and no {stem}.safetensors.index.json; .bin files are not read."
    )


def weight_files(folder: pathlib.Path, stem: str) -> dict[str, pathlib.Path]:
    """Variant ("" is the plain one) -> its file, or the index of its shards; the first is the one that is read."""
    names = [file.name for file in folder.glob(f"{stem}*") if file.is_file()]
    found = {variant: folder / name for variant, name in variant_names(names, stem).items()}
    # Who fetches a variant often fetches all JSON files with it: an index without its shards is read where nothing else is there.
    whole = (name for name, file in found.items() if file.suffix != ".json" or not _missing_shards(file))
    return {name: found[name] for name in itertools.islice(whole, 1)} | found


def variant_names(names: Collection[str], stem: str) -> dict[str, str]:
    """As `weight_files`, of a folder in which files of these names are."""
    found = {}
    for variant in VARIANTS:
        infix = f".{variant}" if variant else ""
        for name in (f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json"):
            if variant not in found and name in names:
                found[variant] = name
    return found


def open_file(file: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of the file; its header is read and checked.

    Raises:
      ValueError: the file is truncated or damaged, or was never fetched; names it.
    """
    check_fetched(file)
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = sorted((_stored(file, 8 + length, name, facts) for name, facts in header.items()), key=_place)
        end = 8 + length
        for name, tensor in tensors:
            if tensor.offset != end:
                raise ValueError(f"{name} starts at byte {tensor.offset}, the tensor before it ends at {end}")
            end += tensor.nbytes
        if end != size:
            raise ValueError(f"the header announces {end} bytes")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} ({size} bytes) is truncated or damaged: {error}. Fetch or write it again.") from error
    return dict(tensors)


def read_metadata(file: pathlib.Path) -> dict[str, str]:
    """What a safetensors file that `open_file` has opened says beside its tensors."""
    with file.open("rb") as stream:
        found = json.loads(stream.read(int.from_bytes(stream.read(8), "little"))).get("__metadata__")
    return found if isinstance(found, dict) else {}


def _stored(file: pathlib.Path, base: int, name: str, facts: Mapping) -> tuple[str, StoredTensor]:
    if facts["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the dtype {facts['dtype']!r}, known are {', '.join(DTYPES)}")
    start, stop = facts["data_offsets"]
    tensor = StoredTensor(file, base + start, tuple(facts["shape"]), DTYPES[facts["dtype"]])
    if any(not isinstance(n, int) or n < 0 for n in (start, stop, *tensor.shape)) or stop - start != tensor.nbytes:
        raise ValueError(f"{name} {list(tensor.shape)} {facts['dtype']} does not take the bytes {start} to {stop}")
    return name, tensor


def _place(item: tuple[str, StoredTensor]) -> tuple[int, int]:
    return item[1].offset, item[1].nbytes


def write_tensors(
    folder: pathlib.Path, stem: str, tensors: Mapping[str, np.ndarray], *, dtype: str, max_shard_bytes: int
) -> None:
    """Writes what `open_tensors` reads. Each file is complete or absent; files of `stem` from an earlier write go last.

    One tensor after the other is cast and written, so that memory holds one of them besides `tensors`.

    Args:
      tensors: name -> array, contiguous or not.
      dtype: "float32", "float16" or "bfloat16": what every tensor but integers is cast to.
      max_shard_bytes: more than this is spread over several files, none larger (unless by one tensor).

    Raises:
      ValueError: an unknown `dtype`, or a tensor holds numbers that it cannot; nothing is written then.
    """
    check_dtype(dtype)
    for name, value in tensors.items():
        _check_range(name, value, dtype)
    specs = {name: (value.shape, _stored_dtype(value, dtype)) for name, value in tensors.items()}
    shards = _plan_shards(specs, max_shard_bytes)
    single = f"{stem}.safetensors"
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else [single]
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in zip(files, shards, strict=True):
        # As the library of the format orders them: the widest numbers first.
        in_order = {name: specs[name] for name in sorted(names, key=lambda name: (-specs[name][1].itemsize, name))}
        atomic.write_file(folder / file, _file_content(tensors, in_order))
    if len(shards) > 1:
        total = sum(_nbytes(spec) for spec in specs.values())
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / f"{single}.index.json", {"metadata": {"total_size": total}, "weight_map": places})
        files.append(f"{single}.index.json")
    for old in folder.glob(f"{stem}*safetensors*"):
        if old.name not in files:
            old.unlink()


def _plan_shards(specs: Mapping[str, Spec], max_shard_bytes: int) -> list[list[str]]:
    """Names by file, each filled in the order of `specs` until the next tensor would be too much."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + _nbytes(spec) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(spec)
    return shards


def _file_content(tensors: Mapping[str, np.ndarray], specs: Mapping[str, Spec]) -> Iterator[bytes | memoryview]:
    yield safetensors_header(specs, {"format": "pt"})
    for name, (_, dtype) in specs.items():
        value = np.ascontiguousarray(tensors[name].astype(dtype, copy=False))
        yield memoryview(value.reshape(-1).view(np.uint8))


def write_json(file: pathlib.Path, values: Mapping) -> None:
    """Writes an object, readable by people too."""
    atomic.write_file(file, (json.dumps(values, indent=2) + "\n").encode())


def safetensors_header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with, for tensors that follow in the order of `specs`."""
    code = {dtype: name for name, dtype in DTYPES.items()}
    header: dict = {"__metadata__": dict(metadata)}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + _nbytes(spec)
        shape, dtype = spec
        header[name] = {"dtype": code[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    return len(text).to_bytes(8, "little") + text


def _open_shards(index: pathlib.Path) -> dict[str, StoredTensor]:
    places = _places(index)
    shards, missing = sorted(set(places.values())), _missing_shards(index)
    if not shards:
        raise ValueError(f"{index} names no shard at all; it has an empty weight_map.")
    if missing:
        raise FileNotFoundError(f"{index} names {', '.join(missing)}, which the folder lacks. Fetch the shards again.")
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in itertools.chain.from_iterable(open_file(index.parent / shard).items() for shard in shards):
        if name in tensors:
            raise ValueError(
                f"{name} stands in both {tensors[name].file} and {tensor.file.name}: shards of two models. "
                "Fetch the shards again."
            )
        tensors[name] = tensor
    absent = sorted(name for name, shard in places.items() if name not in tensors or tensors[name].file.name != shard)
    if absent:
        raise ValueError(f"{index} promises {', '.join(absent[:5])}, which no shard holds. Fetch the shards again.")
    return tensors


def _places(index: pathlib.Path) -> dict[str, str]:
    """Tensor -> its shard."""
    places = read_json(index).get("weight_map", {})
    if not isinstance(places, dict) or not all(map(_is_file_name, places.values())):
        raise ValueError(f"{index}: its weight_map is not one of tensors to files beside it. Fetch it again.")
    return places


def _missing_shards(index: pathlib.Path) -> list[str]:
    return [shard for shard in sorted(set(_places(index).values())) if not (index.parent / shard).is_file()]


def _is_file_name(value) -> bool:
    """Whether a value of JSON can only mean a file beside its own."""
    return isinstance(value, str) and value != "" and pathlib.PurePath(value).name == value


def _nbytes(spec: Spec) -> int:
    shape, dtype = spec
    return math.prod(shape) * dtype.itemsize


def _stored_dtype(value: np.ndarray, dtype: str) -> np.dtype:
    return value.dtype if value.dtype.kind == "i" else STORED_DTYPES[dtype]


def check_dtype(dtype: str) -> None:
    """Raises ValueError for a dtype that weights are not stored in."""
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(STORED_DTYPES)}.")


def _check_range(name: str, value: np.ndarray, dtype: str) -> None:
    """Raises ValueError where a tensor holds numbers that `dtype` cannot."""
    with np.errstate(over="ignore"):
        cast = value.astype(_stored_dtype(value, dtype), copy=False)
    if np.isfinite(cast.astype(np.float32, copy=False)).all():
        return
    if not np.isfinite(value.astype(np.float32, copy=False)).all():
        raise ValueError(f"{name} is not finite and is not written; the run it comes from has diverged.")
    raise ValueError(f"{name} exceeds the range of {dtype}. Use dtype='float32' or 'bfloat16'.")
