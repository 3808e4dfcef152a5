"""Reads PyTorch `.pth` files as NumPy arrays, without PyTorch and without running what the pickle names.

A `.pth` file is a pickle whose tensors are references into raw buffers. Two layouts are in use:

* zip (PyTorch 1.6 and later): members `NAME/data.pkl` (the pickle), `NAME/data/KEY` (one raw buffer each) and
  `NAME/byteorder`;
* legacy (before 1.6): four pickles in a row (magic number, protocol 1001, facts about the writing machine, the object),
  a fifth with the list of buffer keys, then per key an int64 element count and the raw elements.

A pickle may name any importable function and call it, which is why a stranger's file must not reach `pickle.load`. Here
only the handful of names a state dict needs resolve, and none of them resolves to PyTorch or does anything but record its
arguments; every other name is refused. Arrays are made afterwards, from the records, with their bounds checked.
"""

import collections
import io
import math
import os
import pathlib
import pickle
import struct
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sana_jax.weights.stored import StoredTensor

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_STORAGE_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class _Storage(NamedTuple):
    """Reference to a raw buffer of `count` elements."""

    key: str
    dtype: str
    count: int


class _Tensor(NamedTuple):
    """A strided view of a storage, all counts in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
    """Stands for `torch._utils._rebuild_tensor_v2`: records the view."""
    del requires_grad, hooks, metadata
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor, requires_grad=False, hooks=None):
    """Stands for `torch._utils._rebuild_parameter`: a parameter is its tensor."""
    del requires_grad, hooks
    return tensor


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves the names of a state dict, refuses all others."""

    def __init__(self, file: io.BufferedIOBase, where: str):
        super().__init__(file, encoding="utf-8")
        self._where = where
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
            # A function of this load alone: a pickle can set attributes on what it is given.
            return lambda *arguments: _tensor(*arguments)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda *arguments: _parameter(*arguments)
        if module == "torch" and name in _STORAGE_DTYPES:
            return name  # a string cannot be called or changed
        raise pickle.UnpicklingError(
            f"{self._where} names {module}.{name}, which a file of tensors does not need; only tensors, OrderedDict and plain "
            "containers are read. If you trust the file, save its state dict alone: torch.save(model.state_dict(), path)."
        )

    def persistent_load(self, reference):
        match reference:
            case ("storage", str(dtype), str(key), _, int(count)) | (
                "storage",
                str(dtype),
                str(key),
                _,
                int(count),
                None,
            ):
                storage = _Storage(key, dtype, count)
            case _:
                raise pickle.UnpicklingError(
                    f"{self._where} holds the reference {reference!r}, which is not a whole storage."
                )
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"{self._where} describes storage {key!r} twice, differently.")
        return storage


def load(path: str | os.PathLike, lazy: bool = False) -> Any:
    """Reads the object in a `.pth` file; its tensors become NumPy arrays (bfloat16 through ml_dtypes).

    Args:
      path: file in zip or legacy layout.
      lazy: leave tensors on disk as `StoredTensor` where they are contiguous and the file is a zip file that stores them
        plainly, as PyTorch writes it. Their checksums are then not compared.

    Returns:
      What was saved, usually a dict of name -> array, made of OrderedDict, dict, list, tuple, numbers, strings and arrays.

    Raises:
      pickle.UnpicklingError: the pickle names something other than tensors, OrderedDict and plain containers (the message
        says what), or describes a tensor outside its buffer.
      ValueError: the file is in neither layout, or ends too early.
    """
    where = os.fspath(path)
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):
            return _load_zip(file, where, lazy)
        file.seek(0)
        if file.read(4) == b"PK\x03\x04":
            raise ValueError(f"{where} is a zip file cut short: its directory at the end is missing. Fetch it again.")
        file.seek(0)
        return _load_legacy(file, where)


def _load_zip(file: io.BufferedIOBase, where: str, lazy: bool) -> Any:
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{where} is a zip file without one NAME/data.pkl; it was not written by torch.save.")
        root = pickles[0].removesuffix("data.pkl")
        unpickler = _RestrictedUnpickler(io.BytesIO(archive.read(pickles[0])), where)
        recorded = unpickler.load()
        order = archive.read(root + "byteorder").decode() if root + "byteorder" in archive.namelist() else "little"
        buffers = {}
        for key, storage in unpickler.storages.items():
            try:
                member = archive.getinfo(f"{root}data/{key}")
            except KeyError:
                raise ValueError(f"{where} has no member {root}data/{key}, which its pickle refers to.") from None
            if lazy and member.compress_type == zipfile.ZIP_STORED and order == "little":
                buffers[key] = _stored(file, member, storage, where)
            else:
                buffers[key] = _elements(archive.read(member), storage, order, where)
    return _materialise(recorded, buffers, where)


def _stored(file: io.BufferedIOBase, member: zipfile.ZipInfo, storage: _Storage, where: str) -> StoredTensor:
    """A buffer left in its place in the zip file."""
    file.seek(member.header_offset)
    header = file.read(30)  # of which the lengths of name and extra field may differ from the directory's
    name_length, extra_length = struct.unpack_from("<HH", header, 26) if len(header) == 30 else (0, 0)
    start = member.header_offset + 30 + name_length + extra_length
    dtype = _STORAGE_DTYPES[storage.dtype]
    size = storage.count * dtype.itemsize
    if header[:4] != b"PK\x03\x04" or member.file_size != size or start + size > os.fstat(file.fileno()).st_size:
        raise ValueError(
            f"{where} is cut short or damaged: buffer {storage.key!r} has {member.file_size} bytes, "
            f"{storage.count} x {dtype.name} need {size}."
        )
    return StoredTensor(pathlib.Path(where), start, (storage.count,), dtype)


def _load_legacy(file: io.BufferedIOBase, where: str) -> Any:
    try:
        magic = _RestrictedUnpickler(file, where).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError):
        magic = None
    if magic != _MAGIC_NUMBER:
        raise ValueError(
            f"{where} is neither a zip file nor a legacy PyTorch file (its first pickle is not the magic number)."
        )
    protocol = _RestrictedUnpickler(file, where).load()
    if protocol != _LEGACY_PROTOCOL:
        raise ValueError(f"{where} has legacy protocol {protocol!r}; {_LEGACY_PROTOCOL} is the only one there is.")
    machine = _RestrictedUnpickler(file, where).load()
    order = "little" if machine.get("little_endian", True) else "big"
    unpickler = _RestrictedUnpickler(file, where)
    recorded = unpickler.load()
    keys = _RestrictedUnpickler(file, where).load()
    buffers = {}
    for key in keys:
        if key not in unpickler.storages:
            raise ValueError(f"{where} stores the buffer {key!r}, which its pickle does not refer to.")
        storage = unpickler.storages[key]
        count = file.read(8)
        if len(count) != 8 or struct.unpack("<q" if order == "little" else ">q", count)[0] != storage.count:
            raise ValueError(
                f"{where} is cut short or damaged: buffer {key!r} does not announce {storage.count} elements."
            )
        raw = file.read(storage.count * _STORAGE_DTYPES[storage.dtype].itemsize)
        buffers[key] = _elements(raw, storage, order, where)
    if missing := unpickler.storages.keys() - buffers.keys():
        raise ValueError(f"{where} lacks the buffers {sorted(missing)}, which its pickle refers to.")
    return _materialise(recorded, buffers, where)


def _elements(raw: bytes, storage: _Storage, order: str, where: str) -> np.ndarray:
    dtype = _STORAGE_DTYPES[storage.dtype]
    if len(raw) != storage.count * dtype.itemsize:
        raise ValueError(
            f"{where} is cut short or damaged: buffer {storage.key!r} has {len(raw)} bytes, "
            f"{storage.count} x {dtype.name} need {storage.count * dtype.itemsize}."
        )
    if order not in ("little", "big"):
        raise ValueError(f"{where} has the byte order {order!r}; little and big are known.")
    if order == "big" and dtype.itemsize > 1:
        return np.frombuffer(raw, np.dtype(f">u{dtype.itemsize}")).astype(f"<u{dtype.itemsize}").view(dtype)
    return np.frombuffer(raw, dtype)


def _materialise(recorded: Any, buffers: dict[str, np.ndarray | StoredTensor], where: str) -> Any:
    """Puts arrays in the places of the records."""
    if isinstance(recorded, _Tensor):
        return _array(recorded, buffers, where)
    if isinstance(recorded, _Storage):
        return np.array(buffers[recorded.key][...])
    if isinstance(recorded, dict):
        return type(recorded)((key, _materialise(value, buffers, where)) for key, value in recorded.items())
    if isinstance(recorded, list | tuple):
        return type(recorded)(_materialise(value, buffers, where) for value in recorded)
    return recorded


def _array(tensor: _Tensor, buffers: dict[str, np.ndarray | StoredTensor], where: str) -> np.ndarray | StoredTensor:
    storage, offset, shape, strides = tensor
    counts = (offset, *shape, *strides)
    if (
        not isinstance(storage, _Storage)
        or len(shape) != len(strides)
        or any(type(c) is not int or c < 0 for c in counts)
    ):
        raise pickle.UnpicklingError(f"{where} describes a tensor in a way that makes no sense: {tensor!r}.")
    buffer = buffers[storage.key]
    size = int(np.prod(shape, dtype=object))
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if size and (last >= buffer.size or size > buffer.size):
        raise pickle.UnpicklingError(
            f"{where} describes a tensor of shape {shape}, strides {strides} and offset {offset} outside its buffer of "
            f"{buffer.size} elements."
        )
    if not size:
        return np.zeros(shape, buffer.dtype)
    if isinstance(buffer, StoredTensor):
        if all(
            n == 1 or stride == math.prod(shape[i + 1 :])
            for i, (n, stride) in enumerate(zip(shape, strides, strict=True))
        ):
            return StoredTensor(buffer.file, buffer.offset + offset * buffer.dtype.itemsize, shape, buffer.dtype)
        buffer = buffer[...]
    view = np.lib.stride_tricks.as_strided(buffer[offset:], shape, [stride * buffer.itemsize for stride in strides])
    return view.copy()
