"""A further scale of attention's tokens in XLA's operations: what CPUs and GPUs run."""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float
from sana_jax.kernels.depthwise_conv.api import depthwise_conv


def further_scale(
    grids: tuple[Float[Array, "B H W C"], ...],
    depth: Float[Array, "P k k C"],
    group: Float[Array, "P G D D"],
    row_padding: int,
) -> tuple[Float[Array, "B h W C"], ...]:
    """As `api.further_scale`, of all grids in one array, so that parts of one product need not be split first."""
    x = jnp.concatenate(grids, axis=-1)
    y = depthwise_conv(x, rearrange(depth, "p a b c -> a b (p c)"), row_padding=row_padding)
    matrices = rearrange(group, "p g i o -> (p g) i o").astype(x.dtype)
    y = jnp.einsum("bhwgi,gio->bhwgo", rearrange(y, "b h w (g i) -> b h w g i", g=len(matrices)), matrices)
    return tuple(jnp.split(rearrange(y, "b h w g o -> b h w (g o)"), len(grids), axis=-1))
