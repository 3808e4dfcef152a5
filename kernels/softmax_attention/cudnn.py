"""Softmax attention as cuDNN's fused kernel (flash attention, arXiv 2307.08691): the logits stay on the chip."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from sana_jax.kernels.choice import has_gpu
from sana_jax.kernels.derivatives import in_forward_mode
from sana_jax.kernels.softmax_attention.reference import MASKED

MAX_HEAD_DIM = 128


def refusal(q: Float[Array, "B N C"], k: Float[Array, "B L C"], v: Float[Array, "B L C"], *, heads: int) -> str | None:
    """Why cuDNN cannot work on these arrays here, or None where it can."""
    if in_forward_mode():
        return "it has no derivative in forward mode"
    dtypes, head_dim = sorted({str(x.dtype) for x in (q, k, v)}), q.shape[-1] // heads
    if dtypes not in (["bfloat16"], ["float16"]):
        return f"its arrays are {', '.join(dtypes)}; all must be bfloat16, or all float16"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"a head has {head_dim} channels; it takes multiples of 8 up to {MAX_HEAD_DIM}"
    if not all(isinstance(n, int) for x in (q, k) for n in x.shape):
        return f"the shapes {q.shape} and {k.shape} are symbolic (jax.export), and it is called for numbers"
    if not has_gpu() or "cuda" not in (found := jax.devices()[0]).client.platform_version:
        return "this process has no NVIDIA GPU"
    if float(found.compute_capability) < 8:
        return f"the {found.device_kind} has compute capability {found.compute_capability}; it takes 8.0 and later"
    return None


def softmax_attention(
    q: Float[Array, "B N C"],
    k: Float[Array, "B L C"],
    v: Float[Array, "B L C"],
    mask: Bool[Array, "B L"] | None = None,
    *,
    heads: int,
) -> Float[Array, "B N C"]:
    """As `api.softmax_attention`; the weights of the values are rounded as in the form that XLA sees whole.

    cuDNN's derivative takes even numbers of queries and keys alone: odd ones get one more, which is not seen.
    """
    length, odd = q.shape[1], k.shape[1] % 2
    if odd and mask is None:
        mask = jnp.ones(k.shape[:2], bool)
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0))) for x in (q, k, v))
    bias = None
    if mask is not None:  # cuDNN reads a value for each logit
        rows = jnp.pad(jnp.where(mask, 0, MASKED), ((0, 0), (0, odd)), constant_values=2 * MASKED).astype(q.dtype)
        bias = jnp.broadcast_to(rows[:, None, None], (q.shape[0], 1, q.shape[1], k.shape[1]))
    split = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    return jax.nn.dot_product_attention(*split, bias=bias, implementation="cudnn").reshape(q.shape)[:, :length]


def softmax_attention_vjp(q, k, v, mask, g, *, heads: int) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v."""
    return jax.vjp(functools.partial(softmax_attention, mask=mask, heads=heads), q, k, v)[1](g)
