"""Activation functions, rounded once: in bfloat16 every step of them would be, and on CPUs float32 inside is faster too."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def silu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """x sigmoid(x): of the Mix-FFN, of DC-AE's convolutions and of the noise level's embedding."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)  # the backward pass keeps x alone, and nothing in float32
def gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """x Phi(x) by the tanh formula (arXiv 1606.08415, section 2): of the text encoder and of the text's projection."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)
