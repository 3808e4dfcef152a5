"""A dense layer as the textbook writes it."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def dense(
    x: Float[Array, "*B C"], kernel: Float[Array, "C D"], bias: Float[Array, "D"] | None = None
) -> Float[Array, "*B D"]:
    """x @ kernel + bias in the dtype of x."""
    y = jnp.matmul(x, kernel.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype)
