"""Grids whose rows are split over a mesh axis: what a layer needs of the other devices' rows.

Inside `jax.shard_map` device i of the axis holds a grid's rows i * H to (i + 1) * H - 1. Modules that can work so have a
field `seq_axis`, the axis' name; None, its default, says that the grid is whole and costs nothing. Convolutions take a
few rows from their neighbours, linear attention adds up its states, everything else is local. All of it is differentiable.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped


def with_neighbour_rows(
    x: Float[Array, "B H W C"], axis: str, above: int = 1, below: int = 1
) -> Float[Array, "B h W C"]:
    """`above` last rows of the device before, x, and `below` first rows of the device after; zeros outside the picture.

    A convolution that pads no rows then gives the rows of x, as the whole grid's would with its padding of zeros.

    Raises:
      ValueError: a device has fewer rows than its neighbours ask for.
    """
    _check_rows(x, axis, max(above, below))
    devices = split_count(axis)
    down = [(i, i + 1) for i in range(devices - 1)]
    up = [(i + 1, i) for i in range(devices - 1)]
    parts = [x]
    if above:  # a device that nobody sends to receives zeros
        parts.insert(0, jax.lax.ppermute(x[:, -above:], axis, down))
    if below:
        parts.append(jax.lax.ppermute(x[:, :below], axis, up))
    return jnp.concatenate(parts, axis=1)


def each_with_neighbour_rows(
    grids: Sequence[Float[Array, "B H W C"]], axis: str, reach: int
) -> list[Float[Array, "B h W C"]]:
    """`with_neighbour_rows` of each, `reach` above and below; the rows of all travel together."""
    _check_rows(grids[0], axis, reach)
    outer = jnp.concatenate([x[:, np.r_[:reach, -reach:0]] for x in grids], axis=-1)
    exchanged = jnp.split(with_neighbour_rows(outer, axis, reach, reach), len(grids), axis=-1)
    return [
        jnp.concatenate([rows[:, :reach], x, rows[:, -reach:]], axis=1)
        for rows, x in zip(exchanged, grids, strict=True)
    ]


def _check_rows(x: Float[Array, "B H W C"], axis: str, needed: int) -> None:
    if x.shape[1] < needed:
        raise ValueError(
            f"a device holds {x.shape[1]} rows and its neighbour needs {needed}. Use a smaller mesh.{axis}, or larger "
            "pictures."
        )


def split_count(axis: str | None) -> int:
    """Over how many devices the rows are split."""
    return 1 if axis is None else jax.lax.axis_size(axis)


def own_rows(values: Shaped[Array, "N ..."], axis: str | None) -> Shaped[Array, "H ..."]:
    """Of values for every row of the whole grid, those of this device's rows."""
    if axis is None:
        return values
    rows = values.shape[0] // split_count(axis)
    return jax.lax.dynamic_slice_in_dim(values, jax.lax.axis_index(axis) * rows, rows)
