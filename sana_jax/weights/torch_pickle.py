"""Reads PyTorch `.pth` files as NumPy arrays, without PyTorch and without running what the pickle names.

A `.pth` file is a pickle whose tensors are references into raw buffers. Two layouts are in use:

* zip (PyTorch 1.6 and later): members `NAME/data.pkl` (the pickle), `NAME/data/KEY` (one raw buffer each) and
  `NAME/byteorder`;
* legacy (before 1.6): four pickles in a row (magic number, protocol 1001, facts about the writing machine, the object),
  a fifth with the list of buffer keys, then per key an int64 element count and the raw elements.

A pickle may name any importable function and call it, which is why a stranger's file must not reach `pickle.load`. Here
only the handful of names a state dict needs resolve, and none of them resolves to PyTorch or does anything but record its
arguments; every other name is refused. Arrays are made afterwards, from the records, with their bounds checked. Arrays of
NumPy, which training checkpoints hold as a random state, are passed over.
"""

import collections
import contextlib
import io
import math
import os
import pathlib
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sana_jax.weights.stored import StoredTensor

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_LONGEST_LINE = 2**16  # bytes of a name in a pickle, which ends with its line

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


class _Refused(pickle.UnpicklingError, ValueError):
    """What a pickle asks for and is not given; the other UnpicklingErrors are of bytes that are no pickle."""


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


class Unread:
    """Stands in what was loaded for NumPy's own objects, such as the random state that a training run saves."""

    def __setstate__(self, state):
        del state

    def __repr__(self) -> str:
        return "<of NumPy, not read>"


# What pickles of NumPy arrays, scalars and dtypes call, in NumPy 1 and 2, and how pickles of protocol 2 write bytes.
_UNREAD = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    *((module, name) for module in _MULTIARRAY for name in ("_reconstruct", "scalar")),
}


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves the names of a state dict and of what training saves beside it, refuses all others."""

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
        if (module == "torch" and name in _STORAGE_DTYPES) or (module, name) == ("numpy", "ndarray"):
            return name  # a string cannot be called or changed
        if (module, name) in _UNREAD:
            return lambda *arguments: Unread()
        raise _Refused(
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
                storage = None
        if storage is None or dtype not in _STORAGE_DTYPES or count < 0:
            raise _Refused(f"{self._where} holds the reference {reference!r}, which is not a whole storage.")
        if self.storages.setdefault(key, storage) != storage:
            raise _Refused(f"{self._where} describes storage {key!r} twice, differently.")
        return storage


def load(path: str | os.PathLike, lazy: bool = False) -> Any:
    """Reads the object in a `.pth` file; its tensors become NumPy arrays (bfloat16 through ml_dtypes).

    Args:
      path: file in zip or legacy layout.
      lazy: leave tensors on disk as `StoredTensor` where they are contiguous and the file is a zip file that stores them
        plainly, as PyTorch writes it. Their checksums are then not compared.

    Returns:
      What was saved, usually a dict of name -> array, made of OrderedDict, dict, list, tuple, numbers, strings and arrays;
      `Unread` in the places of NumPy's objects.

    Raises:
      pickle.UnpicklingError: the pickle names something other than tensors, OrderedDict and plain containers (the message
        says what), or describes a tensor outside its buffer.
      ValueError: the file is in neither layout, ends too early or is damaged in another way.
    """
    where = os.fspath(path)
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):
            return _load_zip(file, where, lazy)
        file.seek(0)
        if file.read(4) == b"PK\x03\x04":
            raise ValueError(
                f"{where} is a zip file cut short or damaged: its directory at the end is missing. Fetch it again."
            )
        file.seek(0)
        return _load_legacy(file, where)


@contextlib.contextmanager
def _damage_named(where: str, what: str) -> Iterator[None]:
    """Makes a ValueError with the file's name of whatever is raised by reading damaged bytes.

    That may be anything: the unpickler carries out the bytes as a program, and zipfile reads them as offsets.
    """
    try:
        yield
    except (_Refused, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's, not one of bz2 or lzma, which a damaged directory may call for
        raise ValueError(f"{where} is damaged: {what}: {str(error) or repr(error)}. Fetch it again.") from error


class _ShortReads:
    """A file as `pickletools.genops` reads it, which allocates no more than the file has left."""

    def __init__(self, file: io.BufferedIOBase):
        self._file, self.tell = file, file.tell
        place = file.tell()
        self._end = file.seek(0, os.SEEK_END)
        file.seek(place)

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._end - self._file.tell()))

    def readline(self) -> bytes:
        return self._file.readline(_LONGEST_LINE)


def _next_pickle(file: io.BufferedIOBase) -> bytes:
    """The pickle that begins here, up to its end, if its opcodes are what they should be by their form.

    The unpickler allocates on the word of a pickle: as many bytes as a string claims to have, and a memo as long as the
    highest number in it. So both are compared first with what there is.

    Raises:
      ValueError: they are not.
    """
    start = file.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(_ShortReads(file))):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= argument <= count:
            raise ValueError(f"operation {count} of its pickle keeps an object under the number {argument}")
    length = file.tell() - start
    file.seek(start)
    return file.read(length)


def _unpickle(file: io.BufferedIOBase, where: str) -> tuple[Any, dict[str, _Storage]]:
    """(what the pickle that begins here holds, the storages it refers to)."""
    with _damage_named(where, "its pickle cannot be read"):
        unpickler = _RestrictedUnpickler(io.BytesIO(_next_pickle(file)), where)
        return unpickler.load(), unpickler.storages


def _load_zip(file: io.BufferedIOBase, where: str, lazy: bool) -> Any:
    with _damage_named(where, "its zip directory cannot be read"):
        archive = zipfile.ZipFile(file)
    members = {member.filename: member for member in archive.infolist()}
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{where} is a zip file without one NAME/data.pkl; it was not written by torch.save.")
    root = pickles[0].removesuffix("data.pkl")
    recorded, storages = _unpickle(io.BytesIO(_member(archive, members[pickles[0]], where)), where)
    order = "little"
    if root + "byteorder" in members:
        order = _member(archive, members[root + "byteorder"], where).decode("ascii", "replace")
    buffers = {}
    for key, storage in storages.items():
        name = f"{root}data/{key}"
        if name not in members:
            raise ValueError(f"{where} has no member {name}, which its pickle refers to.")
        _check_size(members[name].file_size, storage, where)
        if lazy and members[name].compress_type == zipfile.ZIP_STORED and order == "little":
            buffers[key] = _stored(file, members[name], storage, where)
        else:
            buffers[key] = _elements(_member(archive, members[name], where), storage, order, where)
    return _materialise(recorded, buffers, where)


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> bytes:
    size = os.fstat(archive.fp.fileno()).st_size
    if not 0 <= member.header_offset <= member.header_offset + member.compress_size <= size:
        raise ValueError(
            f"{where} is cut short or damaged: its member {member.filename!r} would be at byte {member.header_offset} "
            f"and have {member.compress_size}, and the file has {size}."
        )
    with _damage_named(where, f"its member {member.filename!r} cannot be read"):
        return archive.read(member)


def _check_size(size: int, storage: _Storage, where: str) -> None:
    dtype = _STORAGE_DTYPES[storage.dtype]
    if size != storage.count * dtype.itemsize:
        raise ValueError(
            f"{where} is cut short or damaged: buffer {storage.key!r} has {size} bytes, "
            f"{storage.count} x {dtype.name} need {storage.count * dtype.itemsize}."
        )


def _stored(file: io.BufferedIOBase, member: zipfile.ZipInfo, storage: _Storage, where: str) -> StoredTensor:
    """A buffer left in its place in the zip file; its size is checked."""
    size = os.fstat(file.fileno()).st_size
    header = b""
    if 0 <= member.header_offset < size:
        file.seek(member.header_offset)
        header = file.read(30)  # of which the lengths of name and extra field may differ from the directory's
    name_length, extra_length = struct.unpack_from("<HH", header, 26) if len(header) == 30 else (0, 0)
    start = member.header_offset + 30 + name_length + extra_length
    if header[:4] != b"PK\x03\x04" or start + member.file_size > size:
        raise ValueError(f"{where} is cut short or damaged: buffer {storage.key!r} is not where its directory says.")
    return StoredTensor(pathlib.Path(where), start, (storage.count,), _STORAGE_DTYPES[storage.dtype])


def _load_legacy(file: io.BufferedIOBase, where: str) -> Any:
    try:
        magic, _ = _unpickle(file, where)
    except (ValueError, pickle.UnpicklingError):
        magic = None
    if magic != _MAGIC_NUMBER:
        raise ValueError(
            f"{where} is neither a zip file nor a legacy PyTorch file (its first pickle is not the magic number)."
        )
    protocol, _ = _unpickle(file, where)
    if protocol != _LEGACY_PROTOCOL:
        raise ValueError(f"{where} has legacy protocol {protocol!r}; {_LEGACY_PROTOCOL} is the only one there is.")
    machine, _ = _unpickle(file, where)
    recorded, storages = _unpickle(file, where)
    keys, _ = _unpickle(file, where)
    if not isinstance(machine, dict) or not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{where} is damaged: it has no list of its buffers. Fetch it again.")
    order = "little" if machine.get("little_endian", True) else "big"
    buffers = {}
    for key in keys:
        if key not in storages:
            raise ValueError(f"{where} stores the buffer {key!r}, which its pickle does not refer to.")
        storage = storages[key]
        count = file.read(8)
        if len(count) != 8 or struct.unpack("<q" if order == "little" else ">q", count)[0] != storage.count:
            raise ValueError(
                f"{where} is cut short or damaged: buffer {key!r} does not announce {storage.count} elements."
            )
        size = storage.count * _STORAGE_DTYPES[storage.dtype].itemsize
        _check_size(min(size, os.fstat(file.fileno()).st_size - file.tell()), storage, where)
        buffers[key] = _elements(file.read(size), storage, order, where)
    if missing := storages.keys() - buffers.keys():
        raise ValueError(f"{where} lacks the buffers {sorted(missing)}, which its pickle refers to.")
    return _materialise(recorded, buffers, where)


def _elements(raw: bytes, storage: _Storage, order: str, where: str) -> np.ndarray:
    _check_size(len(raw), storage, where)
    dtype = _STORAGE_DTYPES[storage.dtype]
    if order not in ("little", "big"):
        raise ValueError(f"{where} has the byte order {order!r}; little and big are known.")
    if order == "big" and dtype.itemsize > 1:
        return np.frombuffer(raw, np.dtype(f">u{dtype.itemsize}")).astype(f"<u{dtype.itemsize}").view(dtype)
    return np.frombuffer(raw, dtype)


def _materialise(recorded: Any, buffers: dict[str, np.ndarray | StoredTensor], where: str) -> Any:
    """Puts arrays in the places of the records."""
    with _damage_named(where, "what it holds is not as torch.save writes it"):
        return _with_arrays(recorded, buffers, where)


def _with_arrays(recorded: Any, buffers: dict[str, np.ndarray | StoredTensor], where: str) -> Any:
    if isinstance(recorded, _Tensor):
        return _array(recorded, buffers, where)
    if isinstance(recorded, _Storage):
        return np.array(buffers[recorded.key][...])
    if isinstance(recorded, dict):
        return type(recorded)((key, _with_arrays(value, buffers, where)) for key, value in recorded.items())
    if isinstance(recorded, list | tuple):
        return type(recorded)(_with_arrays(value, buffers, where) for value in recorded)
    return recorded


def _array(tensor: _Tensor, buffers: dict[str, np.ndarray | StoredTensor], where: str) -> np.ndarray | StoredTensor:
    storage, offset, shape, strides = tensor
    counts = (offset, *shape, *strides)
    if (
        not isinstance(storage, _Storage)
        or len(shape) != len(strides)
        or any(type(c) is not int or c < 0 for c in counts)
    ):
        raise _Refused(f"{where} describes a tensor in a way that makes no sense: {tensor!r}.")
    buffer = buffers[storage.key]
    size = int(np.prod(shape, dtype=object))
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if size and (last >= buffer.size or size > buffer.size):
        raise _Refused(
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
