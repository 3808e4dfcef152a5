"""What the modules tell XLA's partitioner: activations are split over pictures, parameters are gathered where they are used.

Left to itself it may split the channels of activations instead, the way parameters are stored, and then sums and exchanges
activations in every layer. Everything here acts on the mesh in force (`jax.set_mesh`), and does nothing without one.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, Shaped

from sana_jax.kernels.derivatives import custom_vjp

BATCH_AXES = ("data", "fsdp")  # the mesh axes that hold different pictures


def over_batch(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """x split over the pictures' mesh axes, the other dimensions whole; unchanged where they do not divide the batch."""
    axes, ways = _axes()
    return jax.lax.with_sharding_constraint(x, P(axes)) if ways > 1 and x.shape[0] % ways == 0 else x


@custom_vjp
def gathered(parameter: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The parameter, whole on every device. Its gradient stays as the partitioner has it, so that it can be scattered.

    Cast to the compute dtype before: half the bytes are gathered then.
    """
    return jax.lax.with_sharding_constraint(parameter, P()) if _axes()[1] > 1 else parameter


gathered.defvjp(lambda parameter: (gathered(parameter), None), lambda _, gradient: (gradient,))


def on_own_pictures(
    function: Callable,
    pictures: tuple[PyTree[Shaped[Array, "B ..."]], ...],
    shared: tuple[PyTree[Shaped[Array, "..."]], ...] = (),
):
    """`function(*pictures, *shared)`, called by every device with the pictures that it holds.

    For what the partitioner cannot split, as a Pallas kernel. All results have the pictures first. Where the devices do not
    divide the pictures, each works on all of them. The gradients of `shared` are summed over the devices.
    """
    names = jax.sharding.get_abstract_mesh().auto_axes
    if not names:
        return function(*pictures, *shared)
    axes, ways = _axes()
    split = P(axes) if pictures[0].shape[0] % ways == 0 else P()
    specs = (*(split for _ in pictures), *(P() for _ in shared))
    # Replication is not tracked through the kernels' own derivatives.
    island = jax.shard_map(function, axis_names=set(names), in_specs=specs, out_specs=split, check_vma=False)
    return island(*pictures, *shared)


def picture_devices() -> int:
    """Over how many devices `over_batch` splits pictures."""
    return _axes()[1]


def _axes() -> tuple[tuple[str, ...], int]:
    """The pictures' axes of the mesh in force that the partitioner handles here, and over how many devices they go."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in BATCH_AXES if name in mesh.auto_axes)
    return axes, math.prod(mesh.shape[name] for name in axes)
