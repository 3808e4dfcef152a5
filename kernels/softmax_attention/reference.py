"""Softmax attention as the textbook writes it, in float32."""

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
    r"""$\mathrm{softmax}(q k^T / \sqrt{d} + m)\,v$ per head, d = C / heads; the result has the dtype of q."""

    def split(x):
        return x.astype(jnp.float32).reshape(*x.shape[:2], heads, -1)

    logits = jnp.einsum("bnhd,blhd->bhnl", split(q), split(k)) * (q.shape[-1] // heads) ** -0.5
    if mask is not None:
        logits = logits + jnp.where(mask, 0.0, MASKED)[:, None, None, :]
    return jnp.einsum("bhnl,blhd->bnhd", jax.nn.softmax(logits), split(v)).reshape(q.shape).astype(q.dtype)
