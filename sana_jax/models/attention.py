"""Attention layers of the diffusion transformer: linear or softmax over the latent tokens, softmax over the text."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from sana_jax.kernels.softmax_attention.api import softmax_attention
from sana_jax.models.dense import Dense, StackedDense
from sana_jax.models.linear_attention import attend_linearly
from sana_jax.models.norms import RMSNorm
from sana_jax.models.placement import on_own_pictures


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
            y = attend_linearly(
                q,
                k,
                v,
                head_dim=self.head_dim,
                eps=self.eps,
                stacked=not self.qk_norm,
                seq_axis=self.seq_axis,
                implementation=self.implementation,
            )
        elif self.seq_axis is not None:
            raise ValueError(
                f"self_attention='softmax' needs all tokens on every device, and mesh.{self.seq_axis} splits them. Use "
                f"mesh.{self.seq_axis}=1, or self_attention='linear'."
            )
        else:
            y = attend(q, k, v, heads=x.shape[-1] // self.head_dim)
        if identity is not None:
            y = jnp.where(identity[:, None, None], v, y)
        y = Dense(x.shape[-1], dtype=self.dtype, name="out")(y)
        # The fp16 checkpoints were trained with this clamp in place (NVlabs/Sana until October 2025).
        return jnp.clip(y, -65504, 65504) if self.clamp else y


class TextKeys(NamedTuple):
    """What the attention to the text reads of it, the same at every noise level; of one block, or of N."""

    k: Float[Array, "*N P L C"]
    v: Float[Array, "*N P L C"]


class CrossAttention(nn.Module):
    """Softmax attention from the latent tokens to the text features."""

    width: int
    heads: int
    qk_norm: bool
    norm_eps: float  # 1e-5 in diffusers, 1e-6 in the original code
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.query = Dense(self.width, dtype=self.dtype)
        self.kv = StackedDense(2, self.width, dtype=self.dtype)
        if self.qk_norm:
            self.norm_q = RMSNorm(self.norm_eps)
            self.norm_k = RMSNorm(self.norm_eps)
        self.out = Dense(self.width, dtype=self.dtype)

    def __call__(
        self, x: Float[Array, "B N C"], text: Float[Array, "P L C"] | TextKeys, text_mask: Bool[Array, "P L"]
    ) -> Float[Array, "B N C"]:
        """P divides B: pictures next to each other share a text, whose keys are read as those of one longer picture."""
        q = self.query(x)
        k, v = text if isinstance(text, TextKeys) else self.keys(text)
        if self.qk_norm:
            q = self.norm_q(q)
        q = q.reshape(k.shape[0], -1, self.width)
        return self.out(attend(q, k, v, text_mask, heads=self.heads).reshape(x.shape))

    def keys(self, text: Float[Array, "P L C"]) -> TextKeys:
        """Keys, normalised where the model does so, and values."""
        k, v = self.kv(text)
        return TextKeys(self.norm_k(k) if self.qk_norm else k, v)


def attend(
    q: Float[Array, "B N C"],
    k: Float[Array, "B L C"],
    v: Float[Array, "B L C"],
    mask: Bool[Array, "B L"] | None = None,
    *,
    heads: int,
) -> Float[Array, "B N C"]:
    """`softmax_attention`, every device with its own pictures."""
    return on_own_pictures(functools.partial(softmax_attention, heads=heads), (q, k, v, mask))
