"""A further scale of attention's tokens in XLA's operations: what CPUs and GPUs run."""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float
from sana_jax.kernels.depthwise_conv.api import depthwise_conv


def further_scale(
    x: Float[Array, "B H W C"], depth: Float[Array, "k k C"], group: Float[Array, "G D D"], row_padding: int
) -> Float[Array, "B h W C"]:
    """As `api.further_scale`."""
    y = rearrange(depthwise_conv(x, depth, row_padding=row_padding), "b h w (g i) -> b h w g i", g=len(group))
    return rearrange(jnp.einsum("bhwgi,gio->bhwgo", y, group.astype(x.dtype)), "b h w g o -> b h w (g o)")
