"""ReLU linear attention in XLA's products, some heads side by side in each: what CPUs run.

A head's 32 channels are little for a product and for the copy before it, which XLA makes because the heads' rows lie apart. With
four heads in a matrix the products have four times the operations, of which the blocks on the diagonal are wanted, and take little
longer; the copies take a quarter of the time. Sums of keys are columns of the same products.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from sana_jax.kernels.linear_attention.state import LinearAttentionState

WIDTH = 128  # channels side by side
MIN_TOKENS = 256  # for this form to be worth its while: at 64 that of `xla` takes two thirds of the time


def state(k: Float[Array, "B M C"], v: Float[Array, "B M C"], *, head_dim: int) -> LinearAttentionState:
    """Sums over the tokens."""
    heads = k.shape[-1] // head_dim
    group = _group(heads, head_dim)
    k, v = (_side_by_side(x, group * head_dim) for x in (jax.nn.relu(k), v))
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    sums = jnp.einsum("xnc,xne->xce", k, v)
    pairs = sums[..., :-1].reshape(-1, group, head_dim, group, head_dim)
    return LinearAttentionState(
        kv=jnp.einsum("xgdge->xgde", pairs).reshape(-1, heads, head_dim, head_dim),
        k_sum=sums[..., -1].reshape(-1, heads, head_dim),
    )


def apply(q: Float[Array, "B N C"], state: LinearAttentionState, *, eps: float) -> Float[Array, "B N C"]:
    """Each query reads the state."""
    heads, head_dim = state.k_sum.shape[1:]
    group = _group(heads, head_dim)
    width = group * head_dim
    own = jnp.eye(group)
    kv = state.kv.reshape(-1, group, head_dim, 1, head_dim) * own[:, None, :, None]
    k_sum = state.k_sum.reshape(-1, group, head_dim, 1) * own[:, None, :]
    read = jnp.concatenate([kv.reshape(-1, width, width), k_sum.reshape(-1, width, group)], axis=-1)
    y = jnp.einsum("xnc,xce->xne", _side_by_side(jax.nn.relu(q), width), read)
    values = y[..., :width].reshape(*y.shape[:2], group, head_dim) / (y[..., width:, None] + eps)
    return values.reshape(-1, heads // group, q.shape[1], width).swapaxes(1, 2).reshape(q.shape).astype(q.dtype)


def _group(heads: int, head_dim: int) -> int:
    """Heads of one product."""
    return next(n for n in range(min(heads, max(1, WIDTH // head_dim)), 0, -1) if heads % n == 0)


def _side_by_side(x: Float[Array, "B N C"], width: int) -> Float[Array, "X N W"]:
    """Groups of channels of all pictures, in float32."""
    x = x.astype(jnp.float32).reshape(*x.shape[:2], -1, width)
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], width)
