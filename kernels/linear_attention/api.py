r"""ReLU linear attention of SANA (section 3.2): cost linear in the number of tokens.

The whole is its two halves, one after the other: the sums over keys and values, then what each query reads of them. Tokens
that lie on several devices have their sums added up in between. For the derivative each half keeps what it was given and
computes the rest again, which takes less time and memory than to keep it.

On TPUs the halves are the kernels of `pallas_tpu`, elsewhere XLA's products; those of `pallas_gpu` run where they are asked for.
XLA cannot partition the kernels, so that under a mesh they have to be called within `jax.shard_map`.
"""

import functools
import importlib

import jax
from jax import lax
from jaxtyping import Array, Float
from sana_jax.kernels.linear_attention import pallas_tpu, xla
from sana_jax.kernels.linear_attention.state import LinearAttentionState

__all__ = [
    "IMPLEMENTATIONS",
    "LinearAttentionState",
    "linear_attention",
    "linear_attention_apply",
    "linear_attention_state",
]

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")


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
      implementation: "xla", "pallas_tpu" or "pallas_gpu" (Hopper, bfloat16); None takes the kernels on a TPU where they can work
        on these arrays.

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
    return _state(k, v, head_dim, _choice(implementation, k, v, head_dim=head_dim))


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
    return _apply(q, state, eps, _choice(implementation, q, head_dim=state.kv.shape[-1]))


def _choice(implementation: str | None, *arrays: Array, head_dim: int) -> str | None:
    """A back end that can work on the arrays; None: what the platform, still unknown here, does best."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r} is unknown; use None, {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "xla":
        return implementation
    refusal = _back_end(implementation or "pallas_tpu").refusal(*arrays, head_dim=head_dim)
    if refusal and implementation:
        raise ValueError(f"implementation={implementation!r} cannot run: {refusal}. Use 'xla', or None.")
    return "xla" if refusal else implementation


def _back_end(name: str):
    """Its module: Mosaic GPU takes a quarter of a second to import, and only who asks for it needs it."""
    return importlib.import_module(f"sana_jax.kernels.linear_attention.{name}")


def _run(implementation, function, *arrays, **options):
    if implementation is not None:
        return getattr(_back_end(implementation), function)(*arrays, **options)
    on_tpu, default = (functools.partial(getattr(module, function), **options) for module in (pallas_tpu, xla))
    return lax.platform_dependent(*arrays, tpu=on_tpu, default=default)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _state(k, v, head_dim, implementation):
    return _run(implementation, "state", k, v, head_dim=head_dim)


def _state_forward(k, v, head_dim, implementation):
    return _state(k, v, head_dim, implementation), (k, v)


def _state_backward(head_dim, implementation, residuals, g):
    return _run(implementation, "state_vjp", *residuals, g, head_dim=head_dim)


_state.defvjp(_state_forward, _state_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _apply(q, state, eps, implementation):
    return _run(implementation, "apply", q, state, eps=eps)


def _apply_forward(q, state, eps, implementation):
    return _apply(q, state, eps, implementation), (q, state)


def _apply_backward(eps, implementation, residuals, g):
    return _run(implementation, "apply_vjp", *residuals, g, eps=eps)


_apply.defvjp(_apply_forward, _apply_backward)
