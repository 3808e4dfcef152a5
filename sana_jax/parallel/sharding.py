"""Where the arrays of a training run live: one table for parameters, optimizer state and averages, one rule for batches.

Every model file names the axes of its parameters (`LOGICAL_AXES`); RULES says over which mesh axis a name is split. Change
the rules to try another way of sharding; of all else, only the blocks of eight-bit optimizer state follow them.
"""

import fnmatch
import math

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax.models import autoencoder, controlnet, latent_critic, patch_gan, text_encoder, transformer
from sana_jax.models.layers import SCANNED
from sana_jax.models.placement import BATCH_AXES

# Logical axis -> mesh axis, the first that fits winning: a mesh axis splits one dimension of an array, and must divide it.
# "embed", the residual stream, is the width that all large matrices have, and 64 divides all public ones (1152, 2240, 2304).
RULES = (("embed", "fsdp"), ("mlp", "fsdp"), ("channels", "fsdp"), ("vocab", "fsdp"))

MODELS = {
    "transformer": transformer.LOGICAL_AXES,
    "teacher": transformer.LOGICAL_AXES,
    "controlnet": controlnet.LOGICAL_AXES,
    "text_encoder": text_encoder.LOGICAL_AXES,
    "autoencoder": autoencoder.LOGICAL_AXES,
    "discriminator": patch_gan.LOGICAL_AXES,
    "critic": latent_critic.LOGICAL_AXES,
    "perceptual": {"*": None},  # 13 MB (EfficientNet) or 59 MB (VGG), frozen
}

MIN_SHARDED = 2**14  # elements; gathering a smaller array costs more latency than its copies cost memory
MUST_SHARD = 2**22  # elements; an array this large kept whole on every device is a mistake in the mesh

# A batch is split over every device that holds a different shard of it; tokens of a latent grid also over `seq`
# (by rows, so that the depthwise convolutions exchange one row).
BATCH = P(BATCH_AXES)
LATENTS = P(BATCH_AXES, "seq")


def path_names(path) -> tuple[str, ...]:
    """Names along a key path of `jax.tree_util`, e.g. ("params", "blocks", "attention", "kernel")."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def is_scanned(path) -> bool:
    """Whether the array at this key path is stacked over layers on its first axis."""
    return any(name in SCANNED for name in path_names(path))


def logical_axes(names: tuple[str, ...]) -> tuple[str | None, ...] | None:
    """Names of the axes of the parameter that a path leads to or through; None where nothing of it is split.

    The path is a parameter's own, with the model's name before it (transformer/blocks/...), or that of a statistic that
    the optimizer keeps of it (.../transformer/blocks/.../kernel/momentum).

    Raises:
      ValueError: the parameter stands in no table.
    """
    return _parameter(names)[1]


def split_axis(names: tuple[str, ...]) -> int | None:
    """The dimension of a parameter that the first rule to fit splits, on meshes that divide it; None where none is."""
    axes = logical_axes(names) or ()
    return next((axes.index(logical) for logical, _ in RULES if logical in axes), None)


def _parameter(names: tuple[str, ...]) -> tuple[str | None, tuple[str | None, ...] | None]:
    """(name, logical axes) of the parameter that a path leads to or through; (None, None) where there is none."""
    model = next((i for i, name in enumerate(names) if name in MODELS), None)
    if model is None:
        return None, None
    table, rest = MODELS[names[model]], names[model + 1 :]
    for end in range(1, len(rest) + 1):
        prefix = "/".join(rest[:end])
        for pattern, axes in table.items():
            if fnmatch.fnmatchcase(prefix, pattern):
                return f"{names[model]}/{prefix}", axes
    raise ValueError(
        f"{'/'.join(rest)} of the {names[model]} stands in no row of its LOGICAL_AXES; add one beside the model."
    )


def array_spec(path, shape: tuple[int, ...], mesh_shape: dict[str, int]) -> P:
    """How a parameter of this shape is split, by the tables of this file. Below MIN_SHARDED elements it is kept whole.

    Raises:
      ValueError: the parameter stands in no table, or no rule can split a large array.
    """
    names = path_names(path)
    axes = logical_axes(names)
    if axes is None or len(axes) != len(shape) or math.prod(shape) < MIN_SHARDED:
        return P()
    spec, refused = [None] * len(shape), []
    for logical, mesh_axis in RULES:
        ways = mesh_shape[mesh_axis]
        if ways == 1 or logical not in axes or mesh_axis in spec:
            continue
        dimension = axes.index(logical)
        if shape[dimension] % ways:
            refused.append(dimension)
        else:
            spec[dimension] = mesh_axis
    if refused and not any(spec):
        name, fsdp = "/".join(names), mesh_shape["fsdp"]
        if math.prod(shape) >= MUST_SHARD:
            devices = mesh_shape["data"] * fsdp  # another mesh.fsdp has to divide them too
            best = max(
                ways
                for dimension in refused
                for ways in range(1, fsdp + 1)
                if math.gcd(shape[dimension], devices) % ways == 0
            )
            raise ValueError(
                f"mesh.fsdp={fsdp} divides no dimension of {name} {list(shape)} that may be split. "
                f"Use mesh.fsdp={best} and mesh.data={devices // best}."
            )
        logging.info("%s %s is kept whole on every device: fsdp=%d divides none of its dimensions", name, shape, fsdp)
    while spec and spec[-1] is None:
        spec.pop()
    return P(*spec)


def shardings(tree, mesh: Mesh):
    """NamedShardings for a tree of arrays or of their shapes (`jax.eval_shape`), by `specs`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, dict(mesh.shape)))


def specs(tree, mesh_shape: dict[str, int]):
    """How the arrays of a tree are split: parameters by `array_spec`.

    What the optimizer keeps of a parameter (row means, the scales of eight-bit blocks) is split as the parameter is, as
    far as its own size can be, so that no update moves any of it between devices; of another rank it is kept whole.
    """
    shapes = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = _parameter(path_names(path))[0]
        shapes[name] = max(shapes.get(name, ()), x.shape, key=math.prod)  # no statistic is larger than its parameter

    def spec(path, x):
        shape = shapes[_parameter(path_names(path))[0]]
        if len(shape) != len(x.shape):
            return P()
        pairs = zip(array_spec(path, shape, mesh_shape), x.shape, strict=False)
        return P(*(axis if axis and size % mesh_shape[axis] == 0 else None for axis, size in pairs))

    return jax.tree_util.tree_map_with_path(spec, tree)


def placed(shapes, mesh: Mesh):
    """Shapes (`jax.eval_shape`) that also say where each array is to live, as restoring and compiling want them."""
    places_of = shardings(shapes, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places_of)


def places(placed_shapes):
    """The shardings of what `placed` gives."""
    return jax.tree.map(lambda x: x.sharding, placed_shapes)


def own_positions(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Positions in a batch that this process's devices hold, ascending: what it has to load, on any arrangement of hosts.

    Hosts that share pictures, because `seq` crosses them, load the same positions.
    """
    slices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in slices]))


def put_batch(batch, mesh: Mesh, batch_size: int):
    """This process's part of a batch (arrays of the rows `own_positions`) -> global arrays split over their first axis."""
    sharding, own = NamedSharding(mesh, BATCH), own_positions(batch_size, mesh)

    def put(x):
        def rows(index):
            first, last, _ = index[0].indices(batch_size)
            at = np.searchsorted(own, first)
            return x[at : at + last - first]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, rows)

    return jax.tree.map(put, batch)
