"""Where the arrays of a training run live: one rule for parameters, optimizer state and averages, one for batches."""

import math

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Modules whose parameters are stacked by nn.scan: their first axis counts layers and is never split, because
# the scan reads one layer at a time.
SCANNED = ("blocks", "layers")

MIN_SHARDED = 2**14  # elements; gathering a smaller array costs more latency than its copies cost memory
MUST_SHARD = 2**22  # elements; an array this large kept whole on every device is a mistake in the mesh

# A batch is split over every device that holds a different shard of it; tokens of a latent grid also over `seq`
# (by rows, so that the depthwise convolutions exchange one row).
BATCH = P(("data", "fsdp"))
LATENTS = P(("data", "fsdp"), "seq")


def path_names(path) -> tuple[str, ...]:
    """Names along a key path of `jax.tree_util`, e.g. ("params", "blocks", "attention", "kernel")."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def is_scanned(path) -> bool:
    """Whether the array at this key path is stacked over layers on its first axis."""
    return any(name in SCANNED for name in path_names(path))


def array_spec(path, shape: tuple[int, ...], fsdp: int) -> P:
    """The rule: split the largest dimension that `fsdp` divides, the layer axis excepted; else keep the array whole.

    Raises:
      ValueError: a large array has no such dimension.
    """
    first = 1 if is_scanned(path) else 0
    if fsdp == 1 or math.prod(shape) < MIN_SHARDED:
        return P()
    divisible = [axis for axis in range(first, len(shape)) if shape[axis] % fsdp == 0]
    if not divisible:
        name = "/".join(path_names(path))
        if math.prod(shape) >= MUST_SHARD:
            best = max(size & -size for size in shape[first:])
            raise ValueError(
                f"mesh.fsdp={fsdp} divides no dimension of {name} {list(shape)} (largest power of two that does: "
                f"{best}). Use mesh.fsdp={best} and a larger mesh.data."
            )
        logging.info("%s %s is kept whole on every device: fsdp=%d divides none of its dimensions", name, shape, fsdp)
        return P()
    axis = max(divisible, key=lambda axis: shape[axis])
    return P(*(None,) * axis, "fsdp")


def shardings(tree, mesh: Mesh):
    """NamedShardings for a tree of arrays or of their shapes (`jax.eval_shape`), by `array_spec`.

    Optimizer state carries the parameters' names in its paths, so that the same rule puts a moment where its
    parameter is.
    """
    fsdp = mesh.shape["fsdp"]
    return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(mesh, array_spec(path, x.shape, fsdp)), tree)


def placed(shapes, places):
    """Shapes (`jax.eval_shape`) that also say where each array is to live, as restoring a checkpoint wants them."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def put_batch(batch, mesh: Mesh):
    """This process's part of a batch (tree of NumPy arrays) -> global arrays split over their first axis."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_tree(tree, mesh: Mesh):
    """Host arrays that every process holds whole -> global arrays placed by `array_spec`."""
    return jax.device_put(tree, shardings(tree, mesh))
