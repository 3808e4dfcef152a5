"""A further scale of attention's tokens, spelled out."""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float
from sana_jax.kernels.depthwise_conv import reference


def further_scale(
    x: Float[Array, "B H W C"],
    depth: Float[Array, "k k C"],
    group: Float[Array, "G D D"],
    row_padding: int | None = None,
) -> Float[Array, "B h W C"]:
    """The depthwise convolution, then a matrix for every group of consecutive channels."""
    row_padding = depth.shape[0] // 2 if row_padding is None else row_padding
    y = reference.depthwise_conv(x, depth, row_padding)
    y = jnp.einsum("bhwgi,gio->bhwgo", rearrange(y, "b h w (g i) -> b h w g i", g=len(group)), group)
    return rearrange(y, "b h w g o -> b h w (g o)")
