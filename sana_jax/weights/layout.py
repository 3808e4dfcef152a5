"""Key tables: how a parameter tree of ours stands in a public checkpoint, read and written by one mechanism.

A table is a list of `Entry`: one parameter of ours, the public tensors it is made of, and the `Form` that says how a
public tensor's axes are laid out. Reading and writing walk the same table, so that read -> write -> read is the identity.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flax import traverse_util


@dataclasses.dataclass(frozen=True)
class Form:
    """A pair of inverse axis permutations between PyTorch's layout and ours."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


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
      path: our path, "/"-separated, e.g. "blocks/attention/qkv/kernel".
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

    def gather(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Assembles our parameter from public tensors."""

        def one(layer):
            parts = [self.form.ours(np.asarray(tensors[name.format(layer=layer)])) for name in self.names]
            if len(parts) == 1:
                return parts[0]
            return np.stack(parts, self.axis) if self.join == "stack" else np.concatenate(parts, self.axis)

        if self.layers is None:
            return one(None)
        return np.stack([one(layer) for layer in range(self.layers)])

    def scatter(self, value: np.ndarray) -> dict[str, np.ndarray]:
        """Takes our parameter apart into public tensors; the inverse of `gather`."""
        out = {}
        for layer in range(self.layers) if self.layers is not None else [None]:
            whole = value if layer is None else value[layer]
            if len(self.names) == 1:
                parts = [whole]
            elif self.join == "stack":
                parts = [np.take(whole, i, self.axis) for i in range(len(self.names))]
            else:
                parts = np.split(whole, len(self.names), self.axis)
            for name, part in zip(self.names, parts, strict=True):
                out[name.format(layer=layer)] = np.ascontiguousarray(self.form.theirs(part))
        return out


def read(
    entries: Sequence[Entry],
    tensors: Mapping[str, np.ndarray],
    abstract_params,
    *,
    ignore: Callable[[str], bool] = lambda name: False,
    where: str = "checkpoint",
) -> dict:
    """Builds our parameter tree from public tensors.

    Args:
      entries: the key table; its paths are exactly those of `abstract_params`.
      tensors: public name -> array.
      abstract_params: tree of anything with a shape, as `jax.eval_shape(module.init, ...)["params"]` gives it.
      ignore: public names that are known and carry nothing (buffers, dropped heads).
      where: how error messages call the source, e.g. a folder.

    Raises:
      ValueError: one message that lists every missing, surplus and misshapen tensor, with the nearest known name.
    """
    wanted = traverse_util.flatten_dict(abstract_params, sep="/")
    _check_table(entries, wanted)
    known = {name for entry in entries for name in entry.public_names()}
    missing = sorted(known - tensors.keys())
    surplus = sorted(name for name in tensors if name not in known and not ignore(name))
    problems = [f"missing {name}{_nearest(name, surplus)}" for name in missing]
    problems += [f"surplus {name}{_nearest(name, missing or sorted(known))}" for name in surplus]
    params = {}
    for entry in entries:
        if any(name not in tensors for name in entry.public_names()):
            continue
        try:
            value = entry.gather(tensors)
        except (ValueError, IndexError) as error:
            shapes = [tuple(np.shape(tensors[name])) for name in entry.public_names()]
            problems.append(f"misshapen {entry.public_names()[0]} {shapes[0]}: {error}")
            continue
        if value.shape != tuple(wanted[entry.path].shape):
            problems.append(
                f"misshapen {entry.public_names()[0]}: gives {entry.path} {value.shape}, the configuration wants "
                f"{tuple(wanted[entry.path].shape)}"
            )
        params[entry.path] = value
    if problems:
        raise ValueError(
            f"{where} does not fit the configuration ({len(problems)} problems):\n  " + "\n  ".join(problems)
        )
    return traverse_util.unflatten_dict(params, sep="/")


def write(entries: Sequence[Entry], params) -> dict[str, np.ndarray]:
    """Public name -> array, the inverse of `read`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    _check_table(entries, flat)
    out = {}
    for entry in entries:
        out.update(entry.scatter(np.asarray(flat[entry.path])))
    return out


def _check_table(entries: Sequence[Entry], flat: Mapping) -> None:
    paths = {entry.path for entry in entries}
    if paths != flat.keys():
        raise ValueError(
            f"the key table and the model disagree: only in the table {sorted(paths - flat.keys())}, "
            f"only in the model {sorted(flat.keys() - paths)}"
        )


def _nearest(name: str, candidates: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""
