"""A further scale of attention's tokens, spelled out."""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float
from sana_jax.kernels.depthwise_conv import reference


def further_scale(
    grids: tuple[Float[Array, "B H W C"], ...],
    depth: Float[Array, "P k k C"],
    group: Float[Array, "P G D D"],
    row_padding: int,
) -> tuple[Float[Array, "B h W C"], ...]:
    """Of each grid the depthwise convolution, then a matrix for every group of consecutive channels."""
    return tuple(_one(*each, row_padding) for each in zip(grids, depth, group, strict=True))


def _one(x, depth, group, row_padding):
    y = reference.depthwise_conv(x, depth, row_padding)
    y = jnp.einsum("bhwgi,gio->bhwgo", rearrange(y, "b h w (g i) -> b h w g i", g=len(group)), group)
    return rearrange(y, "b h w g o -> b h w (g o)")
