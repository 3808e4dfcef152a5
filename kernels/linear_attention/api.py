r"""ReLU linear attention of SANA (section 3.2): cost linear in the number of tokens.

The whole is its two halves, one after the other: the sums over keys and values, then what each query reads of them. Tokens
that lie on several devices have their sums added up in between. For the derivative each half keeps what it was given and
computes the rest again, which takes less time and memory than to keep it.

On TPUs the halves are the kernels of `pallas_tpu`, on Hopper GPUs those of `pallas_gpu`, elsewhere XLA's products.
XLA cannot partition the kernels, so that under a mesh they have to be called within `jax.shard_map`.
"""

import functools

import jax
from jaxtyping import Array, Float
from sana_jax.kernels.choice import choose, run
from sana_jax.kernels.linear_attention.state import LinearAttentionState

__all__ = [
    "IMPLEMENTATIONS",
    "LinearAttentionState",
    "linear_attention",
    "linear_attention_apply",
    "linear_attention_state",
]

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
_PACKAGE = __name__.rpartition(".")[0]


def linear_attention(
    q: Float[Array, "B N C"],
    k: Float[Array, "B M C"],
    v: Float[Array, "B M C"],
    *,
    head_dim: int,
    eps: float = 1e-15,
    implementation: str | None = None,
) -> Float[Array, "B N C"]:
    r"""$o_n = \dfrac{(\sum_m v_m \phi(k_m)^T)\,\phi(q_n)}{(\sum_m \phi(k_m))\cdot\phi(q_n) + \epsilon}$ per head, $\phi$ = ReLU.

    Heads are consecutive groups of `head_dim` channels. No scale, no mask, no softmax; a token whose $\phi(q)$ is all zero
    gives 0. Sums and the division are float32 whatever the inputs are; the result has the dtype of q.

    Args:
      q, k, v: queries, keys and values.
      head_dim: channels of a head.
      eps: positive.
      implementation: "xla", "pallas_tpu" or "pallas_gpu" (Hopper, bfloat16); None takes the kernels on a TPU, or on a GPU that
        this process has, where they can work on these arrays.

    Raises:
      ValueError: `head_dim` does not divide the number of channels, eps is not positive, or the implementation is unknown or
        cannot work on these arrays.
    """
    state = linear_attention_state(k, v, head_dim=head_dim, implementation=implementation)
    return linear_attention_apply(q, state, eps=eps, implementation=implementation)


def linear_attention_state(
    k: Float[Array, "B M C"], v: Float[Array, "B M C"], *, head_dim: int, implementation: str | None = None
) -> LinearAttentionState:
    """First half: sums over the tokens, [B, heads, D, D] and [B, heads, D] in float32."""
    if k.shape[-1] % head_dim:
        raise ValueError(f"head_dim={head_dim} does not divide the {k.shape[-1]} channels; use a divisor of the width.")
    return _state(k, v, head_dim, choose(_PACKAGE, IMPLEMENTATIONS, implementation, k, v, head_dim=head_dim))


def linear_attention_apply(
    q: Float[Array, "B N C"],
    state: LinearAttentionState,
    *,
    eps: float = 1e-15,
    implementation: str | None = None,
) -> Float[Array, "B N C"]:
    """Second half: each query reads the state."""
    if eps <= 0:
        raise ValueError(f"eps={eps} leaves a query without positive channels undefined; use a positive one.")
    choice = choose(_PACKAGE, IMPLEMENTATIONS, implementation, q, head_dim=state.kv.shape[-1])
    return _apply(q, state, eps, choice)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _state(k, v, head_dim, choice):
    return run(_PACKAGE, choice, "state", k, v, head_dim=head_dim)


def _state_forward(k, v, head_dim, choice):
    return _state(k, v, head_dim, choice), (k, v)


def _state_backward(head_dim, choice, residuals, g):
    return run(_PACKAGE, choice, "state_vjp", *residuals, g, head_dim=head_dim)


_state.defvjp(_state_forward, _state_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _apply(q, state, eps, choice):
    return run(_PACKAGE, choice, "apply", q, state, eps=eps)


def _apply_forward(q, state, eps, choice):
    return _apply(q, state, eps, choice), (q, state)


def _apply_backward(eps, choice, residuals, g):
    return run(_PACKAGE, choice, "apply_vjp", *residuals, g, eps=eps)


_apply.defvjp(_apply_forward, _apply_backward)
