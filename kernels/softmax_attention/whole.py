r"""Softmax attention and its derivative with all logits at once, for XLA to fuse.

With $p = \mathrm{softmax}(s)$, $s = q k^T / \sqrt{d} + m$ and $y = p v$, a gradient g of y gives

    $dv = p^T g$,   $dp = g v^T$,   $ds = p\,(dp - \sum_l p_l dp_l)$,   $dq = ds\,k / \sqrt{d}$,   $dk = ds^T q / \sqrt{d}$.

p is calculated again from the largest logit and the sum of each query. (The logarithm of the sum alone, as FlashAttention keeps
it, has no digits left behind the -10000 of a text that is all padding.)
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from sana_jax.kernels.softmax_attention.reference import MASKED


def forward(
    q: Float[Array, "B N C"],
    k: Float[Array, "B L C"],
    v: Float[Array, "B L C"],
    mask: Bool[Array, "B L"] | None,
    *,
    heads: int,
) -> tuple[Float[Array, "B N C"], tuple[Float[Array, "B H N"], Float[Array, "B H N"]]]:
    """The attention, and of each query the largest logit and the sum of the exponentials beside it."""
    logits = _logits(q, k, mask, heads)
    largest = logits.max(-1)
    weights = jnp.exp(logits - largest[..., None])
    total = weights.sum(-1)
    weights = (weights / total[..., None]).astype(v.dtype)
    return jnp.einsum("bhnl,blhd->bnhd", weights, _split(v, heads)).reshape(q.shape), (largest, total)


def backward(q, k, v, mask, statistics, g, *, heads: int) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v."""
    largest, total = (x[..., None] for x in statistics)
    weights = jnp.exp(_logits(q, k, mask, heads) - largest) / total
    dv = jnp.einsum("bhnl,bnhd->blhd", weights.astype(v.dtype), _split(g, heads))
    dweights = jnp.einsum("bnhd,blhd->bhnl", _split(g, heads), _split(v, heads), preferred_element_type=jnp.float32)
    dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    dlogits = (dlogits * _scale(q, heads)).astype(q.dtype)
    dq = jnp.einsum("bhnl,blhd->bnhd", dlogits, _split(k, heads))
    dk = jnp.einsum("bhnl,bnhd->blhd", dlogits, _split(q, heads))
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


def _logits(q, k, mask, heads):
    logits = jnp.einsum("bnhd,blhd->bhnl", _split(q, heads), _split(k, heads), preferred_element_type=jnp.float32)
    logits = logits * _scale(q, heads)
    return logits if mask is None else logits + jnp.where(mask, 0.0, MASKED)[:, None, None, :]


def _scale(q, heads):
    return (q.shape[-1] // heads) ** -0.5


def _split(x, heads):
    return x.reshape(*x.shape[:2], heads, -1)
