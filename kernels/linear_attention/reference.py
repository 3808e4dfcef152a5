"""ReLU linear attention, written as the attention matrix it never needs to form."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def linear_attention(
    q: Float[Array, "B N C"], k: Float[Array, "B M C"], v: Float[Array, "B M C"], *, head_dim: int, eps: float
) -> Float[Array, "B N C"]:
    r"""Attention with the kernel $\phi(q)\cdot\phi(k)$, $\phi = \mathrm{ReLU}$, in quadratic time.

    $A_{nm} = \phi(q_n)\cdot\phi(k_m)$ per head; $o_n = \sum_m A_{nm} v_m / (\sum_m A_{nm} + \epsilon)$.
    Everything in float32; the result has the dtype of q.
    """

    def heads(x):
        return x.astype(jnp.float32).reshape(*x.shape[:2], -1, head_dim)

    scores = jnp.einsum("bnhd,bmhd->bhnm", jnp.maximum(heads(q), 0), jnp.maximum(heads(k), 0))
    weights = scores / (scores.sum(-1, keepdims=True) + eps)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, heads(v)).reshape(q.shape).astype(q.dtype)
