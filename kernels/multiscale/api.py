"""A further scale of the tokens of multi-scale attention (EfficientViT, section 3.1; DC-AE's blocks): each of q, k and v is summed
over its neighbourhood, depthwise, and then mixed within the channels of a head.

On TPUs it is the kernels of `pallas_tpu`, elsewhere XLA's operations. XLA cannot partition the kernels, so that under a mesh
they have to be called within `jax.shard_map`.
"""

from jaxtyping import Array, Float
from sana_jax.kernels.choice import choose, run

IMPLEMENTATIONS = ("xla", "pallas_tpu")
_PACKAGE = __name__.rpartition(".")[0]


def further_scale(
    grids: tuple[Float[Array, "B H W C"], ...],
    depth: Float[Array, "P k k C"],
    group: Float[Array, "P G D D"],
    *,
    row_padding: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B h W C"], ...]:
    r"""$y_{ijgo} = \sum_c G_{gco} \sum_{ab} w_{ab,gc}\,x_{i+a-p,\,j+b-r,\,gc}$ for every grid x, in its dtype.

    Args:
      grids: q, k and v of all heads, D channels each; any number P.
      depth: of each, the convolution's kernel, square and odd.
      group: of each and of each head, its matrix.
      row_padding: p, as that of `depthwise_conv`: rows of zeros above and below x; None keeps the rows of x.
      implementation: "xla" or "pallas_tpu"; None takes the kernels on a TPU where they can work on these arrays.

    Raises:
      ValueError: the implementation is unknown or cannot work on these arrays, or the shapes do not agree.
    """
    # The kernels would not notice: they take 128 channels of whatever there is.
    if len({x.shape for x in grids}) != 1 or {len(depth), len(group)} != {len(grids)}:
        raise ValueError(
            f"the grids are {', '.join(str(x.shape) for x in grids) or 'none'}, with weights for {len(depth)} and matrices "
            f"for {len(group)}; grids must be alike, and have weights and matrices each."
        )
    channels, (groups, inner, outer) = grids[0].shape[-1], group.shape[1:]
    if inner != outer or not channels == depth.shape[-1] == groups * inner:
        raise ValueError(
            f"the grids have {channels} channels, the kernels {depth.shape[-1]}, and there are {groups} matrices of "
            f"{inner}x{outer}; they must be square, and their sides add up to the channels."
        )
    row_padding = depth.shape[1] // 2 if row_padding is None else row_padding
    arrays = grids, depth, group
    choice = choose(_PACKAGE, IMPLEMENTATIONS, implementation, *arrays, row_padding=row_padding)
    return run(_PACKAGE, choice, "further_scale", *arrays, row_padding=row_padding)
