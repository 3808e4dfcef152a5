"""Linear attention as the models call it: every device works on its own pictures, and on its own tokens."""

import functools

import jax
from jaxtyping import Array, Float

from sana_jax.kernels.linear_attention.api import (
    LinearAttentionState,
    linear_attention,
    linear_attention_apply,
    linear_attention_state,
)
from sana_jax.models.placement import on_own_pictures


def attend_linearly(
    q: Float[Array, "B N C"],
    k: Float[Array, "B M C"],
    v: Float[Array, "B M C"],
    *,
    head_dim: int,
    eps: float,
    stacked: bool,
    seq_axis: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "B N C"]:
    """`linear_attention`; over the tokens of all devices of `seq_axis` (`row_split`)."""
    if seq_axis is None:
        options = {"head_dim": head_dim, "eps": eps, "stacked": stacked, "implementation": implementation}
        return on_own_pictures(functools.partial(linear_attention, **options), (q, k, v))
    state = attention_state(k, v, head_dim=head_dim, seq_axis=seq_axis, implementation=implementation)
    return read_state(q, state, eps=eps, implementation=implementation)


def attention_state(
    k: Float[Array, "B M C"],
    v: Float[Array, "B M C"],
    *,
    head_dim: int,
    seq_axis: str | None = None,
    implementation: str | None = None,
) -> LinearAttentionState:
    """Sums over the tokens; over those of all devices of `seq_axis` too (`row_split`)."""
    sums = functools.partial(linear_attention_state, head_dim=head_dim, implementation=implementation)
    state = on_own_pictures(sums, (k, v))
    return state if seq_axis is None else jax.lax.psum(state, seq_axis)


def read_state(
    q: Float[Array, "B N C"], state: LinearAttentionState, *, eps: float, implementation: str | None = None
) -> Float[Array, "B N C"]:
    """What each query finds there."""
    read = functools.partial(linear_attention_apply, eps=eps, implementation=implementation)
    return on_own_pictures(read, (q, state))
