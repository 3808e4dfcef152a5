"""ReLU linear attention of SANA (section 3.2): cost linear in the number of tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class LinearAttentionState(NamedTuple):
    """What the keys and values of a sequence amount to. States of token shards add up (`psum` over the shards)."""

    kv: Float[Array, "B H D D"]  # sum over tokens of relu(k) v^T
    k_sum: Float[Array, "B H D"]  # sum over tokens of relu(k)


def linear_attention(
    q: Float[Array, "B N C"], k: Float[Array, "B M C"], v: Float[Array, "B M C"], *, head_dim: int, eps: float = 1e-15
) -> Float[Array, "B N C"]:
    r"""$o_n = \dfrac{(\sum_m v_m \phi(k_m)^T)\,\phi(q_n)}{(\sum_m \phi(k_m))\cdot\phi(q_n) + \epsilon}$ per head, $\phi$ = ReLU.

    Heads are consecutive groups of `head_dim` channels. No scale, no mask, no softmax; a token whose $\phi(q)$ is all zero
    gives 0. Sums and the division are float32 whatever the inputs are; the result has the dtype of q.

    Raises:
      ValueError: `head_dim` does not divide the number of channels.
    """
    return linear_attention_apply(q, linear_attention_state(k, v, head_dim=head_dim), eps=eps)


def linear_attention_state(
    k: Float[Array, "B M C"], v: Float[Array, "B M C"], *, head_dim: int
) -> LinearAttentionState:
    """First half: sums over the tokens, [B, heads, D, D] and [B, heads, D] in float32."""
    k, v = jax.nn.relu(_split_heads(k, head_dim)), _split_heads(v, head_dim)
    return LinearAttentionState(jnp.einsum("bmhd,bmhe->bhde", k, v), k.sum(1))


def linear_attention_apply(
    q: Float[Array, "B N C"], state: LinearAttentionState, *, eps: float = 1e-15
) -> Float[Array, "B N C"]:
    """Second half: each query reads the state."""
    phi = jax.nn.relu(_split_heads(q, state.kv.shape[-1]))
    values = jnp.einsum("bnhd,bhde->bnhe", phi, state.kv)
    total = jnp.einsum("bnhd,bhd->bnh", phi, state.k_sum)
    return (values / (total[..., None] + eps)).reshape(q.shape).astype(q.dtype)


def _split_heads(x: Float[Array, "B N C"], head_dim: int) -> Float[Array, "B N H D"]:
    if x.shape[-1] % head_dim:
        raise ValueError(f"head_dim={head_dim} does not divide the {x.shape[-1]} channels; use a divisor of the width.")
    return x.astype(jnp.float32).reshape(*x.shape[:2], -1, head_dim)
