"""Decoder-only language model as text encoder: Gemma-2, and Gemma-3 by its differences. Hidden states, no logits."""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from sana_jax.kernels.activations import gelu
from sana_jax.models.dense import Dense
from sana_jax.models.layers import LAYERS, are_apart
from sana_jax.models.norms import RMSNorm
from sana_jax.models.placement import over_batch
from sana_jax.models.remat import check_remat, checkpoint_name, remat
from sana_jax.models.sizes import check_numbers

REMAT_NAMES = ("attention", "feed_forward")


# Names of the parameters' axes, by path; see `parallel.sharding`.
LOGICAL_AXES = {
    "embedding/embedding": ("vocab", "embed"),
    "layers/attention/out/kernel": ("layers", None, "embed"),
    "layers/attention/*/kernel": ("layers", "embed", None),
    "layers/mlp/down/kernel": ("layers", "mlp", "embed"),
    "layers/mlp/*/kernel": ("layers", "embed", "mlp"),
    "*/scale": None,
}


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes and switches of the decoder stack; the defaults are Gemma-2-2b.

    Attributes:
      num_kv_heads: heads of keys and values; each serves num_heads / num_kv_heads query heads.
      sliding_pattern: every `sliding_pattern`-th layer sees all tokens before it, the others a window
        (2: Gemma-2, 6: Gemma-3).
      sliding_window: tokens that a window layer sees, its own included.
      query_pre_attn_scalar: attention scores are divided by its square root.
      attn_logit_softcap: c in c * tanh(score / c); None switches it off. The public SANA models were trained with 50,
        which current PyTorch installations drop under SDPA attention.
      qk_norm: RMSNorm over each head of q and k (Gemma-3).
      rope_theta, rope_local_theta: rotary base of the full and of the window layers; None: one base for all.
      dtype: compute dtype; norms, softmax and rotary angles are float32 whatever it is.
      remat: what the backward pass computes again, "none" to "full"; see `models.remat`.
      unroll: layers per step of the scan; more make a larger program, which CPUs run faster.
    """

    vocab_size: int = 256_000
    hidden_size: int = 2304
    num_layers: int = 26
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 256
    mlp_dim: int = 9216
    sliding_window: int = 4096
    sliding_pattern: int = 2
    query_pre_attn_scalar: int = 256
    attn_logit_softcap: float | None = 50.0
    qk_norm: bool = False
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None
    rms_eps: float = 1e-6
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self):
        check_numbers(
            self,
            counts=("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
                    "sliding_window", "sliding_pattern", "unroll"),
            factors=("query_pre_attn_scalar", "rope_theta", "rope_local_theta", "rms_eps"),
        )  # fmt: skip
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; every key head serves "
                f"the same number of query heads. Use a divisor of {self.num_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd; rotary embedding turns pairs of channels. Use an even one."
            )
        if self.attn_logit_softcap is not None and self.attn_logit_softcap <= 0:
            raise ValueError(f"attn_logit_softcap={self.attn_logit_softcap} must be positive; None switches it off.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is unknown; use float32 or bfloat16.")
        check_remat(self.remat, REMAT_NAMES)

    def layer_slides(self) -> tuple[bool, ...]:
        """Per layer: whether it attends within the window only."""
        return tuple((layer + 1) % self.sliding_pattern != 0 for layer in range(self.num_layers))


class TextPrefix(NamedTuple):
    """What a beginning that many texts share leaves behind in a causal decoder: all that later tokens see of it.

    Attributes:
      keys, values: of every layer, [layers, 1, P, kv heads, head_dim]; the keys are rotated to their positions.
      hidden: final hidden states of the beginning itself.
    """

    keys: Float[Array, "N 1 P K d"]
    values: Float[Array, "N 1 P K d"]
    hidden: Float[Array, "1 P D"]


def prefix_shapes(config: TextEncoderConfig, tokens: int) -> TextPrefix:
    """Shapes of what `TextEncoder.encode_prefix` makes of so many tokens, without tracing it."""
    keys = jax.ShapeDtypeStruct(
        (config.num_layers, 1, tokens, config.num_kv_heads, config.head_dim), jnp.dtype(config.dtype)
    )
    return TextPrefix(keys, keys, jax.ShapeDtypeStruct((1, tokens, config.hidden_size), jnp.dtype(config.dtype)))


def rotary_tables(
    length: int, head_dim: int, theta: float, start: int = 0
) -> tuple[Float[Array, "L half"], Float[Array, "L half"]]:
    r"""Cosine and sine of $p\,\theta^{-2i/d}$ for `length` positions p from `start` on and pairs i < d/2, in float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.arange(start, start + length, dtype=jnp.float32)[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B L *H d"], cos: Float[Array, "L half"], sin: Float[Array, "L half"]
) -> Float[Array, "B L *H d"]:
    """Rotary position embedding (RoFormer, 3.2): turns the pair (x_i, x_{i + d/2}) by its position's angle.

    The pairs are half the width apart, as in the public Gemma weights, and not neighbours as in the paper.
    """
    shape = (cos.shape[0],) + (1,) * (x.ndim - 3) + (cos.shape[1],)
    cos, sin = cos.reshape(shape).astype(x.dtype), sin.reshape(shape).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention_masks(mask: Bool[Array, "B M"], window: int, prefix: int = 0) -> Bool[Array, "2 B L M"]:
    """Which key j a query i may see: [0] valid and j <= i; [1] also i - j < window. The first `prefix` ask nothing."""
    distance = jnp.arange(prefix, mask.shape[1])[:, None] - jnp.arange(mask.shape[1])[None, :]
    causal = mask[:, None, :] & (distance >= 0)
    return jnp.stack([causal, causal & (distance < window)])


def capped_attention(
    q: Float[Array, "B L K G d"],
    k: Float[Array, "B M K d"],
    v: Float[Array, "B M K d"],
    allowed: Bool[Array, "B L M"],
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B L K G d"]:
    r"""Grouped-query attention with capped scores: softmax(c tanh(scale q k^T / c)) v (Gemma-2 report, section 2).

    G query heads share each of the K key heads. The cap c bounds a score to (-c, c); the softmax is float32.
    A query that may see nothing (padding beyond the window) gets the mean of all values, which stays finite.
    """
    scores = jnp.einsum("blkgd,bmkd->bkglm", q, k).astype(jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkglm,bmkd->blkgd", weights, v)


def _projection(config: TextEncoderConfig, features: int, name: str) -> Dense:
    init = nn.initializers.lecun_normal()
    return Dense(features, use_bias=False, kernel_init=init, dtype=jnp.dtype(config.dtype), name=name)


class SelfAttention(nn.Module):
    """Projections, head norms and rotary embedding around `capped_attention`.

    Returns the keys and values of its own tokens too; `before` are those of tokens that stand before all rows.
    """

    config: TextEncoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        allowed: Bool[Array, "B L M"],
        rotary: tuple[Float[Array, "L half"], Float[Array, "L half"]],
        before: tuple[Float[Array, "1 P K d"], Float[Array, "1 P K d"]] | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple[Float[Array, "B L K d"], Float[Array, "B L K d"]]]:
        c = self.config

        def project(heads, name):
            return _projection(c, heads * c.head_dim, name)(x).reshape(*x.shape[:2], heads, c.head_dim)

        q, k, v = project(c.num_heads, "q"), project(c.num_kv_heads, "k"), project(c.num_kv_heads, "v")
        if c.qk_norm:
            q = RMSNorm(c.rms_eps, zero_centred=True, name="norm_q")(q)
            k = RMSNorm(c.rms_eps, zero_centred=True, name="norm_k")(k)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        own = k, v
        if before is not None:
            k, v = (
                jnp.concatenate([jnp.broadcast_to(old, (x.shape[0], *old.shape[1:])).astype(new.dtype), new], axis=1)
                for old, new in zip(before, own, strict=True)
            )
        q = q.reshape(*q.shape[:2], c.num_kv_heads, -1, c.head_dim)
        scale = c.query_pre_attn_scalar**-0.5
        out = capped_attention(q, k, v, allowed, scale=scale, softcap=c.attn_logit_softcap)
        out = out.reshape(*x.shape[:2], c.num_heads * c.head_dim)
        return _projection(c, c.hidden_size, "out")(out), own


class GatedMLP(nn.Module):
    """GeGLU: down(gelu_tanh(gate(x)) * up(x)), without biases."""

    config: TextEncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        c = self.config
        gate = _projection(c, c.mlp_dim, "gate")(x)
        up = _projection(c, c.mlp_dim, "up")(x)
        return _projection(c, c.hidden_size, "down")(gelu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and GeGLU, each between two RMSNorms (before it, and on its output before the residual sum).

    `slides` picks this layer's mask and rotary table: 0 all earlier tokens, 1 the window. It is a scanned input, so
    that one compiled body serves both kinds of layer. `keep` hands out the layer's keys and values.
    """

    config: TextEncoderConfig
    keep: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        slides: Int[Array, ""],
        allowed: Bool[Array, "2 B L M"],
        rotary: tuple[Float[Array, "2 L half"], Float[Array, "2 L half"]],
        before: tuple[Float[Array, "1 P K d"], Float[Array, "1 P K d"]] | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple | None]:
        c = self.config
        x = over_batch(x)
        cos, sin = rotary
        h = RMSNorm(c.rms_eps, zero_centred=True, name="norm_attention_in")(x)
        h, own = SelfAttention(c, name="attention")(h, allowed[slides], (cos[slides], sin[slides]), before)
        x = x + RMSNorm(c.rms_eps, zero_centred=True, name="norm_attention_out")(checkpoint_name(h, "attention"))
        h = RMSNorm(c.rms_eps, zero_centred=True, name="norm_mlp_in")(x)
        h = checkpoint_name(GatedMLP(c, name="mlp")(h), "feed_forward")
        return x + RMSNorm(c.rms_eps, zero_centred=True, name="norm_mlp_out")(h), own if self.keep else None


def scanned_layers(config: TextEncoderConfig):
    """`DecoderLayer` repeated by `lax.scan`: parameters carry a leading layer axis and compile once."""
    return nn.scan(
        remat(DecoderLayer, config.remat, REMAT_NAMES, scanned=True),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast, 0),
        length=config.num_layers,
        unroll=config.unroll,
    )


class LayersApart(nn.Module):
    """What `scanned_layers` gives, of parameters by layer (`models.layers`): for sampling on CPUs and GPUs."""

    config: TextEncoderConfig
    keep: bool = False

    def __call__(self, x, slides, allowed, rotary, before=None):
        layer = DecoderLayer(self.config, self.keep, parent=None)
        run = jax.jit(lambda params, *inputs: layer.apply({"params": params}, *inputs))  # traced once for all layers
        params, kept = self.variables["params"], []
        for number in range(self.config.num_layers):
            prefix = jax.tree.map(lambda array, number=number: array[number], before)
            x, own = run(params[str(number)], x, slides[number], allowed, rotary, prefix)
            kept.append(own)
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *kept)


class TextEncoder(nn.Module):
    """Token ids -> hidden states after the final norm, which is what SANA's cross-attention reads (section 2.3).

    Causal, so that right padding never reaches a valid token: `mask` only hides padding keys from padding queries, and
    states at masked positions carry nothing. Left padding would shift the rotary positions and is not supported.

    Initialisation for training from scratch: embeddings N(0, 1/D), unit variance once multiplied by sqrt(D);
    projections LeCun normal; norm scales zero, which makes every norm the plain RMSNorm.
    """

    config: TextEncoderConfig

    def __call__(
        self,
        token_ids: Int[Array | np.ndarray, "B L"],
        mask: Shaped[Array | np.ndarray, "B L"],
        prefix: TextPrefix | None = None,
    ) -> Float[Array, "B L D"]:
        """Encodes right-padded `token_ids`; `mask` is non-zero at tokens. The result is in the compute dtype.

        `prefix`: of tokens that stand before those of every row, from `encode_prefix`. The states are then those of the
        rest of the longer text.
        """
        return self._decode(token_ids, mask, prefix, keep=False)[0]

    def encode_prefix(self, token_ids: Int[Array | np.ndarray, " P"]) -> TextPrefix:
        """Encodes a beginning once for all texts that have it: keys and values depend on no later token."""
        token_ids = jnp.asarray(token_ids)[None]
        hidden, (keys, values) = self._decode(token_ids, jnp.ones_like(token_ids), None, keep=True)
        return TextPrefix(keys, values, hidden)

    @nn.compact
    def _decode(self, token_ids, mask, prefix: TextPrefix | None, keep: bool):
        """(hidden states, (keys, values) of all layers or None)."""
        c = self.config
        start = 0 if prefix is None else prefix.hidden.shape[1]
        before = None if prefix is None else (prefix.keys, prefix.values)
        init = nn.initializers.normal(stddev=c.hidden_size**-0.5)
        x = nn.Embed(c.vocab_size, c.hidden_size, dtype=c.dtype, embedding_init=init, name="embedding")(token_ids)
        # The public weights were trained with the factor rounded to the compute dtype.
        x = x * jnp.asarray(math.sqrt(c.hidden_size), x.dtype)

        local_theta = c.rope_theta if c.rope_local_theta is None else c.rope_local_theta
        tables = [rotary_tables(token_ids.shape[1], c.head_dim, theta, start) for theta in (c.rope_theta, local_theta)]
        rotary = tuple(jnp.stack(pair) for pair in zip(*tables, strict=True))
        mask = jnp.pad(jnp.asarray(mask) != 0, ((0, 0), (start, 0)), constant_values=True)
        allowed = attention_masks(mask, c.sliding_window, start)

        layers = LayersApart if are_apart(self.variables.get("params", {})) else scanned_layers(c)
        slides = jnp.asarray(c.layer_slides(), jnp.int32)
        x, kept = layers(c, keep, name=LAYERS)(x, slides, allowed, rotary, before)
        return RMSNorm(c.rms_eps, zero_centred=True, name="norm")(x), kept
