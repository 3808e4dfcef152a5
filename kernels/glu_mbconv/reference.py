"""The gated middle of SANA's Mix-FFN, spelled out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from sana_jax.kernels.depthwise_conv import reference


def gated_depthwise(
    x: Float[Array, "B H W C2"], kernel: Float[Array, "kh kw C2"], bias: Float[Array, "C2"], row_padding: int = 1
) -> Float[Array, "B h W C"]:
    """a * SiLU(g), where [a | g] is the depthwise convolution of SiLU(x) plus bias."""
    y = reference.depthwise_conv(jax.nn.silu(x), kernel, row_padding) + bias.astype(x.dtype)
    value, gate = jnp.split(y, 2, axis=-1)
    return value * jax.nn.silu(gate)
