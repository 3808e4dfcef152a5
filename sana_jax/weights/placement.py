"""Where parameters go as they are read: host arrays, or device arrays of which each process reads its own part."""

from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding

# A tree of shardings like the parameters', or a function (path, shape) -> sharding.
Shardings = Mapping | Callable[[str, tuple[int, ...]], Sharding | None]


def default_device(path: str, shape: tuple[int, ...]) -> None:
    """As `shardings`: every parameter whole on JAX's default device, free to move to others (uncommitted)."""


def placed_by(shardings: Shardings | None) -> Callable | None:
    """The `place` argument of `layout.read` that puts each parameter where `shardings` says.

    Args:
      shardings: a tree of `jax.sharding.Sharding`, or a function of ("blocks/self_attention/qkv/kernel", shape) that
        returns one, or None for the default device. None: parameters stay NumPy arrays.

    Raises:
      ValueError: (when a parameter is placed) the tree has no sharding for it, or its axes cannot be split so.
    """
    if shardings is None:
        return None
    if isinstance(shardings, Mapping):
        flat = traverse_util.flatten_dict(dict(shardings), sep="/")

        def sharding_of(path, shape):
            if path not in flat:
                raise ValueError(
                    f"shardings has nothing for {path} {list(shape)}; it must be a tree like the parameters."
                )
            return flat[path]

    else:
        sharding_of = shardings

    def place(path: str, shape: tuple[int, ...], assemble: Callable) -> jax.Array:
        sharding = sharding_of(path, shape)
        if sharding is None:
            array = jax.device_put(assemble())
        else:
            try:
                indices = sharding.addressable_devices_indices_map(shape).values()
            except ValueError as error:
                raise ValueError(f"{path} {list(shape)} cannot be placed: {error}") from error
            box = _bounding_box(indices, shape)
            part = assemble(box=box)

            def local(index):
                return part[_relative(index, box, shape)]

            array = jax.make_array_from_callback(shape, sharding, local, dtype=part.dtype)
        # Transfers are asynchronous; waiting keeps one parameter in host memory, not all of them.
        return array.block_until_ready()

    return place


def _bounding_box(indices: Iterable, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The smallest part of an array that holds what all of this process's devices want; empty where they want nothing."""
    ranges = [[part.indices(n)[:2] for part, n in zip(index, shape, strict=True)] for index in indices]
    if not ranges:
        return tuple(slice(0, 0) for _ in shape)
    ranges = np.reshape(ranges, (len(ranges), len(shape), 2))
    starts, stops = ranges[:, :, 0].min(axis=0), ranges[:, :, 1].max(axis=0)
    return tuple(slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True))


def _relative(index, box: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    out = []
    for part, within, n in zip(index, box, shape, strict=True):
        start, stop, _ = part.indices(n)
        out.append(slice(start - within.start, stop - within.start))
    return tuple(out)
