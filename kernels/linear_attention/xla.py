"""ReLU linear attention as XLA's own products, for every platform and shape."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from sana_jax.kernels.linear_attention.state import LinearAttentionState


def state(k: Float[Array, "B M C"], v: Float[Array, "B M C"], *, head_dim: int) -> LinearAttentionState:
    """Sums over the tokens."""
    k, v = jax.nn.relu(_split_heads(k, head_dim)), _split_heads(v, head_dim)
    return LinearAttentionState(jnp.einsum("bmhd,bmhe->bhde", k, v), k.sum(1))


def apply(q: Float[Array, "B N C"], state: LinearAttentionState, *, eps: float) -> Float[Array, "B N C"]:
    """Each query reads the state."""
    phi = jax.nn.relu(_split_heads(q, state.kv.shape[-1]))
    values = jnp.einsum("bnhd,bhde->bnhe", phi, state.kv)
    total = jnp.einsum("bnhd,bhd->bnh", phi, state.k_sum)
    return (values / (total[..., None] + eps)).reshape(q.shape).astype(q.dtype)


def _split_heads(x: Float[Array, "B N C"], head_dim: int) -> Float[Array, "B N H D"]:
    return x.astype(jnp.float32).reshape(*x.shape[:2], -1, head_dim)
