"""The activation function of the Mix-FFN and of the DC-AE's convolutions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def silu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """x sigmoid(x), rounded once: in bfloat16 every step would be, and on CPU float32 inside is faster too."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)
