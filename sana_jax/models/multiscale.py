"""A further scale of attention as the models call it: every device works on its own pictures, and on its own rows."""

import functools

from jaxtyping import Array, Float

from sana_jax.kernels.multiscale import api
from sana_jax.models.placement import on_own_pictures
from sana_jax.models.row_split import each_with_neighbour_rows


def further_scale(
    qkv: tuple[Float[Array, "B H W C"], ...],
    depth: Float[Array, "3 k k C"],
    group: Float[Array, "3 G D D"],
    seq_axis: str | None = None,
) -> tuple[Float[Array, "B H W C"], ...]:
    """`kernels.multiscale` of q, k and v, where the rows may be split over `seq_axis` (`row_split`)."""
    row_padding = depth.shape[1] // 2
    if seq_axis is not None:
        qkv, row_padding = each_with_neighbour_rows(qkv, seq_axis, reach=row_padding), 0
    run = functools.partial(api.further_scale, row_padding=row_padding)
    return on_own_pictures(lambda *arrays: run(arrays[:3], *arrays[3:]), tuple(qkv), (depth, group))
