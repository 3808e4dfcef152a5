"""The gated middle of SANA's Mix-FFN, spelled out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from sana_jax.kernels.depthwise_conv import reference


def gated_depthwise(
    value: Float[Array, "B H W C"],
    gate: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw C2"],
    bias: Float[Array, "C2"],
    row_padding: int = 1,
) -> Float[Array, "B h W C"]:
    """a * SiLU(g), where [a | g] is the depthwise convolution of SiLU([value | gate]) plus bias."""
    x = jnp.concatenate([value, gate], axis=-1)
    y = reference.depthwise_conv(jax.nn.silu(x), kernel, row_padding) + bias.astype(x.dtype)
    a, g = jnp.split(y, 2, axis=-1)
    return a * jax.nn.silu(g)
