"""The gated middle of a Mix-FFN as the models call it: every device works on its own pictures, and on its own rows."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sana_jax.kernels.glu_mbconv import api
from sana_jax.models.placement import on_own_pictures
from sana_jax.models.row_split import with_neighbour_rows


def gated_depthwise(
    value: Float[Array, "B H W C"],
    gate: Float[Array, "B H W C"],
    kernel: Float[Array, "3 3 C2"],
    bias: Float[Array, "C2"],
    seq_axis: str | None = None,
) -> Float[Array, "B H W C"]:
    """`kernels.glu_mbconv`, where the rows may be split over `seq_axis` (`row_split`)."""
    row_padding = 1
    if seq_axis is not None:
        # Zero rows outside the picture stay zero under SiLU, so that they are the convolution's own padding.
        value, gate = _with_neighbour_rows(value, gate, seq_axis)
        row_padding = 0
    run = functools.partial(api.gated_depthwise, row_padding=row_padding)
    return on_own_pictures(run, (value, gate), (kernel, bias))


def _with_neighbour_rows(value, gate, seq_axis):
    """Both halves with a row above and below, which travel together."""
    outer = jnp.concatenate([half[:, np.array([0, -1])] for half in (value, gate)], axis=-1)
    exchanged = jnp.split(with_neighbour_rows(outer, seq_axis), 2, axis=-1)
    return [
        jnp.concatenate([rows[:, :1], half, rows[:, -1:]], axis=1)
        for rows, half in zip(exchanged, (value, gate), strict=True)
    ]
