"""The gated middle of a Mix-FFN as the models call it: every device works on its own pictures, and on its own rows."""

import functools

from jaxtyping import Array, Float

from sana_jax.kernels.glu_mbconv import api
from sana_jax.models.placement import on_own_pictures
from sana_jax.models.row_split import each_with_neighbour_rows


def gated_depthwise(
    value: Float[Array, "B H W C"],
    gate: Float[Array, "B H W C"],
    kernel: Float[Array, "3 3 C2"],
    bias: Float[Array, "C2"],
    seq_axis: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "B H W C"]:
    """`kernels.glu_mbconv`, where the rows may be split over `seq_axis` (`row_split`)."""
    row_padding = 1
    if seq_axis is not None:
        # Zero rows outside the picture stay zero under SiLU, so that they are the convolution's own padding.
        value, gate = each_with_neighbour_rows((value, gate), seq_axis, reach=1)
        row_padding = 0
    run = functools.partial(api.gated_depthwise, row_padding=row_padding, implementation=implementation)
    return on_own_pictures(run, (value, gate), (kernel, bias))
