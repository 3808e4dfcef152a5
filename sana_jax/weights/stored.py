"""Tensors that stay on disk until their numbers are wanted."""

import dataclasses
import math
import os
import pathlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A contiguous, little-endian tensor within a file. Indexing reads; nothing is kept.

    Attributes:
      file: where it is.
      offset: of its first byte in the file.
      shape, dtype: of the tensor; bfloat16 and the like through ml_dtypes.
    """

    file: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.size * self.dtype.itemsize

    def __getitem__(self, rows) -> np.ndarray:
        """Reads `tensor[...]`, or of the first axis the range `tensor[start:stop]`: that many bytes and no others.

        The bytes are read, not mapped: a file on a disk that fails gives an error here, not a signal to the process.

        Raises:
          ValueError: the file ends before the tensor does.
          TypeError: any other index.
        """
        if rows is Ellipsis:
            start, shape = 0, self.shape
        elif isinstance(rows, slice) and rows.step in (None, 1) and self.shape:
            start, stop, _ = rows.indices(self.shape[0])
            shape = (max(stop - start, 0), *self.shape[1:])
        else:
            raise TypeError(f"a stored tensor is read as [...] or as [start:stop] of its first axis, not {rows!r}.")
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        raw = np.empty(math.prod(shape) * self.dtype.itemsize, np.uint8)
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.offset + start * row_bytes)
            filled = 0
            while filled < raw.size:
                count = stream.readinto(memoryview(raw)[filled:])
                if not count:
                    raise ValueError(
                        f"{self.file} ({os.path.getsize(self.file)} bytes) is truncated: it ends {raw.size - filled} "
                        "bytes before a tensor that its header announces. Fetch or write it again."
                    )
                filled += count
        return raw.view(self.dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A stored tensor with a product of two others added, W + scale * B A, in float32. Indexing reads all three.

    Attributes:
      base: W [out, ...].
      down: A [r, ...].
      up: B [out, r], or [out, r, 1, 1].
      scale: of the product.
    """

    base: StoredTensor
    down: StoredTensor
    up: StoredTensor
    scale: float
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of W."""
        return self.base.shape

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.base.nbytes + self.down.nbytes + self.up.nbytes

    def __getitem__(self, rows) -> np.ndarray:
        """As of a `StoredTensor`."""
        base, up, down = (x.astype(np.float32) for x in (self.base[rows], self.up[rows], self.down[...]))
        product = up.reshape(-1, self.down.shape[0]) @ down.reshape(self.down.shape[0], -1)
        return base + np.float32(self.scale) * product.reshape(base.shape)
