"""Softmax attention as the textbook writes it, for XLA to fuse."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED = -10000.0  # added to the logits of padding; finite, so that a row without any text stays finite


def softmax_attention(
    q: Float[Array, "B N C"],
    k: Float[Array, "B L C"],
    v: Float[Array, "B L C"],
    mask: Bool[Array, "B L"] | None = None,
    *,
    heads: int,
) -> Float[Array, "B N C"]:
    r"""$\mathrm{softmax}(q k^T / \sqrt{d} + m)\,v$ per head, d = C / heads; products in the inputs' dtype, softmax in float32."""

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1)

    logits = jnp.einsum("bnhd,blhd->bhnl", split(q), split(k), preferred_element_type=jnp.float32)
    logits = logits * (q.shape[-1] // heads) ** -0.5
    if mask is not None:
        logits = logits + jnp.where(mask, 0.0, MASKED)[:, None, None, :]
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnl,blhd->bnhd", weights, split(v)).reshape(q.shape)


def softmax_attention_vjp(q, k, v, mask, g, *, heads: int) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v."""
    return jax.vjp(functools.partial(softmax_attention, mask=mask, heads=heads), q, k, v)[1](g)
