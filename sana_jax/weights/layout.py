"""Key tables: how a parameter tree of ours stands in a public checkpoint, read and written by one mechanism.

A table is a list of `Entry`: one parameter of ours, the public tensors it is made of, and the `Form` that says how a
public tensor's axes are laid out. Reading and writing walk the same table, so that read -> write -> read is the identity.

Reading first compares all names and shapes, then assembles one parameter after the other. The public tensors may still be
on disk (`stored.StoredTensor`): only what a parameter, or the asked-for part of it, is made of is then read.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flax import traverse_util

_LISTED = 20  # misfits of a kind that an error names; to look for the nearest name takes milliseconds each


@dataclasses.dataclass(frozen=True)
class Form:
    """A pair of inverse axis permutations between PyTorch's layout and ours."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]

    def first_axis(self, shape: tuple[int, ...]) -> int | None:
        """The axis of ours that is the first axis of a public tensor of this shape; None where it is not one axis alone.

        Found by following an array that takes steps in memory along its first axis only.
        """
        if not shape:
            return None
        steps = np.broadcast_to(np.arange(shape[0], dtype=np.int32).reshape(-1, *(1,) * (len(shape) - 1)), shape)
        ours = self.ours(steps)
        axes = [axis for axis, stride in enumerate(ours.strides) if stride]
        return axes[0] if len(axes) == 1 and ours.shape[axes[0]] == shape[0] else None

    def part(self, tensor, box: tuple[slice, ...]) -> np.ndarray:
        """The part `box` of a public tensor in our form; of the tensor, only the rows are read that this needs."""
        axis = self.first_axis(tuple(tensor.shape))
        if axis is None:
            return self.ours(tensor[...])[box]
        return self.ours(tensor[box[axis]])[(*box[:axis], slice(None), *box[axis + 1 :])]


SAME = Form(lambda x: x, lambda x: x)
LINEAR = Form(lambda x: x.T, lambda x: x.T)  # [out, in] <-> [in, out]
CONV = Form(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # [O, I, h, w] <-> [h, w, I, O]
POINTWISE = Form(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # [O, I, 1, 1] <-> [I, O]
DEPTHWISE = Form(
    lambda x: x[:, 0].transpose(1, 2, 0), lambda x: x.transpose(2, 0, 1)[:, None]
)  # [C, 1, h, w] <-> [h, w, C]


def grouped_pointwise(groups: int) -> Form:
    """Grouped 1x1 convolution: [groups * out, in, 1, 1] <-> [groups, in, out]."""

    def ours(x):
        return x[:, :, 0, 0].reshape(groups, x.shape[0] // groups, x.shape[1]).transpose(0, 2, 1)

    def theirs(x):
        return x.transpose(0, 2, 1).reshape(-1, x.shape[1])[:, :, None, None]

    return Form(ours, theirs)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours and where a public file keeps it.

    Attributes:
      path: our path, "/"-separated, e.g. "blocks/self_attention/qkv/kernel".
      names: public tensor names. "{layer}" in them runs over `layers`; the results are stacked on a leading axis.
        Several names make one parameter of ours: brought into our form, they are joined along `axis`.
      form: axis layout of one public tensor.
      layers: how many layers "{layer}" runs over; None where the name has none.
      axis: where several names are joined, as an axis of ours without the layer axis.
      join: "concatenate" (along an existing axis) or "stack" (along a new one).
    """

    path: str
    names: tuple[str, ...]
    form: Form = SAME
    layers: int | None = None
    axis: int = -1
    join: str = "concatenate"

    def public_names(self) -> list[str]:
        """Every public tensor this parameter is made of."""
        layers = range(self.layers) if self.layers is not None else [None]
        return [name.format(layer=layer) for layer in layers for name in self.names]

    def public_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of the public tensors that a parameter of this shape is made of."""
        inner = shape if self.layers is None else shape[1:]
        if len(self.names) > 1:
            axis = self.axis % len(inner)
            length = [] if self.join == "stack" else [inner[axis] // len(self.names)]
            inner = (*inner[:axis], *length, *inner[axis + 1 :])
        public = self.form.theirs(np.broadcast_to(np.int8(0), inner)).shape
        return dict.fromkeys(self.public_names(), public)

    def gather(self, tensors: Mapping, shape: tuple[int, ...], dtype=None, box: tuple[slice, ...] | None = None):
        """Assembles our parameter from public tensors, or a part of it.

        Args:
          tensors: public name -> array or `StoredTensor`, of the shapes `public_shapes` gives.
          shape: of the whole parameter.
          dtype: what each public tensor is cast to as it is put in its place; None: the dtype of the first.
          box: the part, as slices with step 1 over all axes; None for the whole.
        """
        box = tuple(
            slice(*part.indices(n)[:2]) for part, n in zip(box or (slice(None),) * len(shape), shape, strict=True)
        )
        dtype = tensors[self.public_names()[0]].dtype if dtype is None else dtype
        out = np.empty([part.stop - part.start for part in box], dtype)
        if self.layers is None:
            self._fill(out, [tensors[name] for name in self.names], box, shape)
            return out
        for layer in range(box[0].start, box[0].stop):
            parts = [tensors[name.format(layer=layer)] for name in self.names]
            self._fill(out[layer - box[0].start], parts, box[1:], shape[1:])
        return out

    def _fill(self, out: np.ndarray, tensors: Sequence, box: tuple[slice, ...], shape: tuple[int, ...]) -> None:
        """Joins one layer's tensors: `out` is the part `box` of an array of the shape `shape`."""
        if len(tensors) == 1:
            _copy(out, self.form.part(tensors[0], box))
            return
        axis = self.axis % len(shape)
        wanted, each = box[axis], shape[axis] // len(tensors)
        for i, tensor in enumerate(tensors):
            start, stop = max(wanted.start, i * each), min(wanted.stop, (i + 1) * each)
            if start >= stop:
                continue
            place = (*(slice(None),) * axis, slice(start - wanted.start, stop - wanted.start))
            if self.join == "stack":
                row = (*place[:-1], start - wanted.start, ...)
                _copy(out[row], self.form.part(tensor, (*box[:axis], *box[axis + 1 :])))
            else:
                within = slice(start - i * each, stop - i * each)
                _copy(out[place], self.form.part(tensor, (*box[:axis], within, *box[axis + 1 :])))

    def scatter(self, value: np.ndarray | Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Takes our parameter apart into public tensors; the inverse of `gather`.

        Args:
          value: the parameter; where it has layers, a list of them will do.

        Returns:
          Public name -> a view of the parameter where the form is a permutation of axes, else an array.
        """
        out = {}
        for layer in range(self.layers) if self.layers is not None else [None]:
            whole = value if layer is None else value[layer]
            if len(self.names) == 1:
                parts = [whole]
            elif self.join == "stack":
                parts = np.moveaxis(whole, self.axis, 0)
            else:
                parts = np.split(whole, len(self.names), self.axis)
            for name, part in zip(self.names, parts, strict=True):
                out[name.format(layer=layer)] = self.form.theirs(part)
        return out


def read(
    entries: Sequence[Entry],
    tensors: Mapping,
    abstract_params,
    *,
    ignore: Callable[[str], bool] = lambda name: False,
    where: str = "checkpoint",
    dtype=None,
    place: Callable | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Builds our parameter tree from public tensors.

    Args:
      entries: the key table; its paths are exactly those of `abstract_params`.
      tensors: public name -> array or `StoredTensor`.
      abstract_params: tree of anything with a shape, as `jax.eval_shape(module.init, ...)["params"]` gives it.
      ignore: public names that are known and carry nothing (buffers, dropped heads).
      where: how error messages call the source, e.g. a folder.
      dtype: of the parameters; None: each as stored.
      place: (path, shape, assemble) -> what stands in the tree for the parameter; `assemble(box)` gives the host array
        of a part of it (see `Entry.gather`). None: the whole array. See `placement`.
      progress: called with (bytes of public tensors used so far, of all) after every parameter.

    Raises:
      ValueError: one message that lists missing, surplus and misshapen tensors, the first 20 of each, with the nearest
        known name; or names the prefix that all surplus names share. Before any tensor is read.
    """
    check(entries, tensors, abstract_params, ignore=ignore, where=where)
    wanted = traverse_util.flatten_dict(abstract_params, sep="/")
    sizes = {entry.path: sum(tensors[name].nbytes for name in entry.public_names()) for entry in entries}
    done, total = 0, sum(sizes.values())
    params = {}
    try:
        for entry in entries:
            shape = tuple(wanted[entry.path].shape)
            assemble = functools.partial(entry.gather, tensors, shape, dtype)
            params[entry.path] = place(entry.path, shape, assemble) if place else assemble()
            done += sizes[entry.path]
            if progress is not None:
                progress(done, total)
    except BaseException:
        params.clear()  # else the traceback would keep the arrays, and the device memory they take
        raise
    return traverse_util.unflatten_dict(params, sep="/")


def check(
    entries: Sequence[Entry],
    tensors: Mapping,
    abstract_params,
    *,
    ignore: Callable[[str], bool] = lambda name: False,
    where: str = "checkpoint",
) -> None:
    """Compares names and shapes of public tensors with what the parameters need; arguments and error as `read`."""
    wanted = traverse_util.flatten_dict(abstract_params, sep="/")
    _check_table(entries, wanted)
    shapes = {}
    for entry in entries:
        shapes |= entry.public_shapes(tuple(wanted[entry.path].shape))
    missing = sorted(shapes.keys() - tensors.keys())
    surplus = sorted(name for name in tensors if name not in shapes and not ignore(name))
    misshapen = [name for name, shape in shapes.items() if name in tensors and tuple(tensors[name].shape) != shape]
    count = len(missing) + len(surplus) + len(misshapen)
    if not count:
        return
    lines = []
    if prefix := _prefix(surplus, missing):
        lines = [f"all {len(surplus)} surplus names are missing ones after {prefix!r}; write the file without it"]
        missing, surplus = sorted(set(missing) - {name.removeprefix(prefix) for name in surplus}), []
    candidates = missing or sorted(shapes)
    lines += _first("missing", missing, lambda name: nearest(name, surplus))
    lines += _first("surplus", surplus, lambda name: nearest(name, candidates))
    lines += _first(
        "misshapen",
        misshapen,
        lambda name: f": is {list(tensors[name].shape)}, the configuration wants {list(shapes[name])}",
    )
    raise ValueError(f"{where} does not fit the configuration ({count} problems):\n  " + "\n  ".join(lines))


def write(entries: Sequence[Entry], params) -> dict[str, np.ndarray]:
    """Public name -> array, the inverse of `read`.

    Most are views of the parameters and not contiguous: `tensor_files.write_tensors` writes them, the library of
    safetensors would write other numbers.

    Args:
      entries: the key table.
      params: arrays, or for stacked ones lists of their layers in NumPy arrays.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    _check_table(entries, flat)
    out = {}
    for entry in entries:
        value = flat[entry.path]
        out.update(entry.scatter(value if isinstance(value, list) else np.asarray(value)))
    return out


def _copy(out: np.ndarray, value: np.ndarray) -> None:
    """`out[...] = value`; between arrays of one two-byte type as integers, which NumPy transposes 3 times as fast."""
    if out.dtype == value.dtype and out.dtype.itemsize == 2:
        out, value = out.view(np.uint16), value.view(np.uint16)
    out[...] = value


def _check_table(entries: Sequence[Entry], flat: Mapping) -> None:
    paths = {entry.path for entry in entries}
    if paths != flat.keys():
        raise ValueError(
            f"the key table and the model disagree: only in the table {sorted(paths - flat.keys())}, "
            f"only in the model {sorted(flat.keys() - paths)}"
        )


def _prefix(surplus: Sequence[str], missing: Sequence[str]) -> str | None:
    """What all surplus names have before a missing one, as the "module." of a wrapped model; None: no such thing."""
    known = set(missing)
    for name in missing if len(surplus) > 1 else ():
        prefix = surplus[0].removesuffix(name)
        if prefix != surplus[0] and all(s.startswith(prefix) and s.removeprefix(prefix) in known for s in surplus):
            return prefix
    return None


def _first(kind: str, names: Sequence[str], describe: Callable[[str], str]) -> list[str]:
    """Lines on the first names of a kind, and one on how many there are besides."""
    lines = [f"{kind} {name}{describe(name)}" for name in names[:_LISTED]]
    return lines + [f"and {len(names) - _LISTED} more {kind}"] * (len(names) > _LISTED)


def nearest(name: str, candidates: Sequence[str]) -> str:
    """ " (nearest: X)" with the closest of `candidates`, or "" where none is close."""
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""
