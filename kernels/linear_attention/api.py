r"""ReLU linear attention of SANA (section 3.2): cost linear in the number of tokens.

The whole is its two halves, one after the other: the sums over keys and values, then what each query reads of them. Tokens
that lie on several devices have their sums added up in between, so that there the halves are called. For the derivative is kept
what was given, and the state; the rest is computed again, which takes less time and memory than to keep it.

On TPUs the halves are the kernels of `pallas_tpu`, on Hopper GPUs those of `pallas_gpu`, elsewhere XLA's products: on CPUs
of some heads at once where the tokens are many.
XLA cannot partition the kernels, so that under a mesh they have to be called within `jax.shard_map`.
"""

import functools

import jax
from jaxtyping import Array, Float
from sana_jax.kernels.choice import choose, run
from sana_jax.kernels.derivatives import custom_vjp
from sana_jax.kernels.linear_attention import xla_wide
from sana_jax.kernels.linear_attention.state import LinearAttentionState

__all__ = [
    "IMPLEMENTATIONS",
    "LinearAttentionState",
    "linear_attention",
    "linear_attention_apply",
    "linear_attention_state",
]

IMPLEMENTATIONS = ("xla", "xla_wide", "pallas_tpu", "pallas_gpu")
_PACKAGE = __name__.rpartition(".")[0]


def linear_attention(
    q: Float[Array, "B N C"],
    k: Float[Array, "B M C"],
    v: Float[Array, "B M C"],
    *,
    head_dim: int,
    eps: float = 1e-15,
    stacked: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B N C"]:
    r"""$o_n = \dfrac{(\sum_m v_m \phi(k_m)^T)\,\phi(q_n)}{(\sum_m \phi(k_m))\cdot\phi(q_n) + \epsilon}$ per head, $\phi$ = ReLU.

    Heads are consecutive groups of `head_dim` channels. No scale, no mask, no softmax; a token whose $\phi(q)$ is all zero
    gives 0. The state, its sums and the division are float32 whatever the inputs are; the result has the dtype of q. What a query
    multiplies of the state is rounded as the device's products have it: to bfloat16 by the kernels where q is, and of float32
    as `jax_default_matmul_precision` says.

    Args:
      q, k, v: queries, keys and values.
      head_dim: channels of a head.
      eps: positive.
      stacked: whether q, k and v are the thirds of one array's channels, as one product makes them. The kernels for GPUs then
        read that array and write one of gradients, and XLA copies nothing; otherwise the values are the same and there are more
        copies. Before JAX 0.12 those gradients cannot be mapped over (`jax.vmap`).
      implementation: "xla", "xla_wide" (some heads in a product), "pallas_tpu" or "pallas_gpu" (Hopper, bfloat16); None takes
        "xla_wide" on a CPU for 256 tokens and more, and the kernels on a TPU, or on a GPU that this process has, where they can
        work on these arrays.

    Raises:
      ValueError: the shapes do not agree, `head_dim` does not divide the number of channels, eps is not positive, or the
        implementation is unknown or cannot work on these arrays.
    """
    if not stacked:
        state = linear_attention_state(k, v, head_dim=head_dim, implementation=implementation)
        return linear_attention_apply(q, state, eps=eps, implementation=implementation)
    if not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k and v of {q.shape}, {k.shape}, {v.shape} are not parts of one array; use stacked=False."
        )
    _check_heads(k.shape[-1], head_dim)
    _check_eps(eps)
    return _stacked(q, k, v, head_dim, eps, _choose(implementation, q, k, v, head_dim=head_dim))


def linear_attention_state(
    k: Float[Array, "B M C"], v: Float[Array, "B M C"], *, head_dim: int, implementation: str | None = None
) -> LinearAttentionState:
    """First half: sums over the tokens, [B, heads, D, D] and [B, heads, D] in float32."""
    if k.shape != v.shape:
        raise ValueError(f"k is {k.shape} and v is {v.shape}; every key needs a value of its width.")
    _check_heads(k.shape[-1], head_dim)
    return _state(k, v, head_dim, _choose(implementation, k, v, head_dim=head_dim))


def linear_attention_apply(
    q: Float[Array, "B N C"],
    state: LinearAttentionState,
    *,
    eps: float = 1e-15,
    implementation: str | None = None,
) -> Float[Array, "B N C"]:
    """Second half: each query reads the state."""
    batch, heads, head_dim = state.k_sum.shape
    if (q.shape[0], q.shape[-1]) != (batch, heads * head_dim):
        raise ValueError(
            f"q is {q.shape} and the state of {batch} sequences with {heads} heads of {head_dim}; q must have as many "
            "sequences and channels."
        )
    _check_eps(eps)
    return _apply(q, state, eps, _choose(implementation, q, head_dim=state.kv.shape[-1]))


def _choose(implementation, *arrays, head_dim):
    few = min(x.shape[1] for x in arrays) < xla_wide.MIN_TOKENS
    only_asked = ("xla_wide",) if few else ()
    return choose(_PACKAGE, IMPLEMENTATIONS, implementation, *arrays, only_asked=only_asked, head_dim=head_dim)


def _check_heads(channels, head_dim):
    if channels % head_dim:
        raise ValueError(f"head_dim={head_dim} does not divide the {channels} channels; use a divisor of the width.")


def _check_eps(eps):
    if eps <= 0:
        raise ValueError(f"eps={eps} leaves a query without positive channels undefined; use a positive one.")


@functools.partial(custom_vjp, nondiff_argnums=(3, 4, 5))
def _stacked(q, k, v, head_dim, eps, choice):
    return run(_PACKAGE, choice, _both_halves, q, k, v, head_dim=head_dim, eps=eps)[0]


def _stacked_forward(q, k, v, head_dim, eps, choice):
    value, state = run(_PACKAGE, choice, _both_halves, q, k, v, head_dim=head_dim, eps=eps)
    return value, (q, k, v, state)


def _stacked_backward(head_dim, eps, choice, residuals, g):
    return run(_PACKAGE, choice, _both_halves_vjp, *residuals, g, eps=eps)


def _both_halves(back_end, q, k, v, *, head_dim, eps):
    """The result and the state: `stacked` of a back end that has it."""
    if hasattr(back_end, "stacked"):
        return back_end.stacked(q, k, v, head_dim=head_dim, eps=eps)
    state = back_end.state(k, v, head_dim=head_dim)
    return back_end.apply(q, state, eps=eps), state


def _both_halves_vjp(back_end, q, k, v, state, g, *, eps):
    """Gradients of q, k and v."""
    if hasattr(back_end, "stacked_vjp"):
        return back_end.stacked_vjp(q, k, v, state, g, eps=eps)
    dq, dstate = _apply_vjp(back_end, q, state, g, eps=eps)
    return dq, *_state_vjp(back_end, k, v, dstate)


_stacked.defvjp(_stacked_forward, _stacked_backward)


@functools.partial(custom_vjp, nondiff_argnums=(2, 3))
def _state(k, v, head_dim, choice):
    return run(_PACKAGE, choice, "state", k, v, head_dim=head_dim)


def _state_forward(k, v, head_dim, choice):
    return _state(k, v, head_dim, choice), (k, v)


def _state_backward(head_dim, choice, residuals, g):
    return run(_PACKAGE, choice, _state_vjp, *residuals, g)


def _state_vjp(back_end, k, v, g):
    """Gradients of k and v."""
    if hasattr(back_end, "state_vjp"):
        return back_end.state_vjp(k, v, g)
    return jax.vjp(functools.partial(back_end.state, head_dim=g.kv.shape[-1]), k, v)[1](g)


_state.defvjp(_state_forward, _state_backward)


@functools.partial(custom_vjp, nondiff_argnums=(2, 3))
def _apply(q, state, eps, choice):
    return run(_PACKAGE, choice, "apply", q, state, eps=eps)


def _apply_forward(q, state, eps, choice):
    return _apply(q, state, eps, choice), (q, state)


def _apply_backward(eps, choice, residuals, g):
    return run(_PACKAGE, choice, _apply_vjp, *residuals, g, eps=eps)


def _apply_vjp(back_end, q, state, g, *, eps):
    """Gradients of q and of the state."""
    if hasattr(back_end, "apply_vjp"):
        return back_end.apply_vjp(q, state, g, eps=eps)
    return jax.vjp(functools.partial(back_end.apply, eps=eps), q, state)[1](g)


_apply.defvjp(_apply_forward, _apply_backward)
