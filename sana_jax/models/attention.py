"""Attention layers of the diffusion transformer: linear or softmax over the latent tokens, softmax over the text."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from sana_jax.models.dense import Dense, StackedDense
from sana_jax.models.linear_attention import attention_state, read_state
from sana_jax.models.norms import RMSNorm

MASKED = -10000.0  # added to the logits of padding; finite, so that a row without any text stays finite


# Cheap mathematics with float32 insides: the backward pass recomputes it from its compute-dtype inputs, which takes less time
# and memory than keeping the intermediates of every layer. (No CSE barrier is needed: the blocks are scanned.)
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


class SelfAttention(nn.Module):
    """Self-attention over the latent tokens: ReLU linear attention (SANA section 2.2), or softmax as the ablation."""

    kind: str  # "linear" or "softmax"
    head_dim: int
    qk_norm: bool  # SANA-1.5: RMSNorm over the full width, before the heads are split
    eps: float
    clamp: bool
    dtype: jnp.dtype = jnp.float32
    seq_axis: str | None = None  # mesh axis over which the tokens are split; see `row_split`
    implementation: str | None = None  # of the linear attention

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], identity: Bool[Array, " B"] | None = None) -> Float[Array, "B N C"]:
        """`identity`: pictures whose tokens attend to themselves alone (perturbed attention guidance)."""
        q, k, v = StackedDense(3, x.shape[-1], use_bias=False, dtype=self.dtype, name="qkv")(x)
        if self.qk_norm:
            q = RMSNorm(1e-5, name="norm_q")(q)
            k = RMSNorm(1e-5, name="norm_k")(k)
        if self.kind == "linear":
            chosen = {"implementation": self.implementation}
            state = attention_state(k, v, head_dim=self.head_dim, seq_axis=self.seq_axis, **chosen)
            y = read_state(q, state, eps=self.eps, **chosen)
        elif self.seq_axis is not None:
            raise ValueError(
                f"self_attention='softmax' needs all tokens on every device, and mesh.{self.seq_axis} splits them. Use "
                f"mesh.{self.seq_axis}=1, or self_attention='linear'."
            )
        else:
            y = recomputed(functools.partial(softmax_attention, heads=x.shape[-1] // self.head_dim))(q, k, v)
        if identity is not None:
            y = jnp.where(identity[:, None, None], v, y)
        y = Dense(x.shape[-1], dtype=self.dtype, name="out")(y)
        # The fp16 checkpoints were trained with this clamp in place (NVlabs/Sana until October 2025).
        return jnp.clip(y, -65504, 65504) if self.clamp else y


class CrossAttention(nn.Module):
    """Softmax attention from the latent tokens to the text features."""

    heads: int
    qk_norm: bool
    norm_eps: float  # 1e-5 in diffusers, 1e-6 in the original code
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N C"], text: Float[Array, "B L C"], text_mask: Bool[Array, "B L"]
    ) -> Float[Array, "B N C"]:
        width = x.shape[-1]
        q = Dense(width, dtype=self.dtype, name="query")(x)
        k, v = StackedDense(2, width, dtype=self.dtype, name="kv")(text)
        if self.qk_norm:
            q = RMSNorm(self.norm_eps, name="norm_q")(q)
            k = RMSNorm(self.norm_eps, name="norm_k")(k)
        y = recomputed(functools.partial(softmax_attention, heads=self.heads))(q, k, v, mask=text_mask)
        return Dense(width, dtype=self.dtype, name="out")(y)


def softmax_attention(
    q: Float[Array, "B N C"],
    k: Float[Array, "B L C"],
    v: Float[Array, "B L C"],
    *,
    heads: int,
    mask: Bool[Array, "B L"] | None = None,
) -> Float[Array, "B N C"]:
    r"""$\mathrm{softmax}(q k^T / \sqrt{d} + m)\,v$ per head, d = C / heads; the softmax is float32.

    m is 0 where `mask` is true and -10000 elsewhere, as in the public code: a row whose mask is all false attends to all of
    its padding instead of giving NaN.
    """

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1)

    logits = jnp.einsum("bnhd,blhd->bhnl", split(q), split(k), preferred_element_type=jnp.float32)
    logits = logits * (q.shape[-1] // heads) ** -0.5
    if mask is not None:
        logits = logits + jnp.where(mask, 0.0, MASKED)[:, None, None, :]
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnl,blhd->bnhd", weights, split(v)).reshape(q.shape)
