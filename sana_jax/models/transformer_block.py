"""The block of the diffusion transformer, and blocks one after the other: scanned, or apart."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from sana_jax.models.attention import CrossAttention, SelfAttention, TextKeys
from sana_jax.models.dense import Dense
from sana_jax.models.feed_forward import GeluMLP, MixFFN
from sana_jax.models.placement import over_batch
from sana_jax.models.remat import checkpoint_name, recomputed, remat
from sana_jax.models.transformer_config import REMAT_NAMES, TransformerConfig

BLOCK_OUTPUT = "output"  # of every block, kept where the call has mutable=["intermediates"]


class Residuals(NamedTuple):
    """What a ControlNet adds between blocks.

    Attributes:
      arrays: of each copied block one, stacked or not.
      first: number of the block to whose output the first is added.
    """

    arrays: Sequence[Float[Array, "B h w C"]] | Float[Array, "R B h w C"]
    first: int


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; one modulation vector shared by all blocks plus a table each.

    Attention to the text has neither norm nor modulation nor gate. Of a ControlNet (`has_residual`) it also gives a projection of
    its output, in place of None.
    """

    config: TransformerConfig
    seq_axis: str | None = None
    has_residual: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        text: Float[Array, "P L C"] | TextKeys,
        text_mask: Bool[Array, "P L"],
        modulation: Float[Array, "B 6 C"],
        perturbed: Bool[Array, " B"] | None = None,
        added: Float[Array, "R B H W C"] | None = None,
        place: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W C"] | None]:
        """`added`: `Residuals.arrays`, of which the one at `place` is added to the output, if that is one of them."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = over_batch(x)
        table = self.param("scale_shift_table", table_init, (6, c.width))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation_rows(table, modulation)

        y = modulated_norm(x, shift_1, scale_1)
        y = SelfAttention(
            c.self_attention,
            c.attention_head_dim,
            c.qk_norm,
            c.attention_eps,
            c.clamp_fp16,
            dtype,
            self.seq_axis,
            _asked(c.attention_implementation),
            name="self_attention",
        )(flatten_grid(y), perturbed)
        x = add_gated(x, gate_1, checkpoint_name(y, "attention").reshape(x.shape))

        y = cross_attention(c, name="cross_attention")(flatten_grid(x), text, text_mask)
        x = x + checkpoint_name(y, "cross_attention").reshape(x.shape)

        y = modulated_norm(x, shift_2, scale_2)
        feed_forward = {"mix_ffn": MixFFN, "gelu_mlp": GeluMLP}[c.feed_forward]
        options = {"implementation": _asked(c.feed_forward_implementation), "name": "feed_forward"}
        y = feed_forward(int(c.mlp_ratio * c.width), dtype, self.seq_axis, **options)(y)
        x = over_batch(add_gated(x, gate_2, checkpoint_name(y, "feed_forward")))
        self.sow("intermediates", BLOCK_OUTPUT, x)
        if added is not None:
            own = jax.lax.dynamic_index_in_dim(added, place, keepdims=False)  # clips
            x = x + jnp.where((place >= 0) & (place < added.shape[0]), own, 0)
        if not self.has_residual:
            return x, None
        return x, Dense(c.width, kernel_init=nn.initializers.zeros, dtype=dtype, name="residual")(x)


def scanned_blocks(config: TransformerConfig, keys_are_stacked: bool = False):
    """`TransformerBlock` repeated by `lax.scan`: parameters carry a leading layer axis and compile once.

    `keys_are_stacked`: the text is that of `text_keys`, of which each block has its own.
    """
    return nn.scan(
        remat(TransformerBlock, config.remat, REMAT_NAMES, scanned=True),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0 if keys_are_stacked else nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast, 0),
        length=config.num_layers,
        unroll=config.unroll,
    )


class BlocksApart(nn.Module):
    """What `scanned_blocks` gives, of parameters by block (`models.layers`): for sampling on CPUs and GPUs."""

    config: TransformerConfig
    seq_axis: str | None = None
    has_residual: bool = False

    def __call__(self, x, text, text_mask, modulation, perturbed=None, control=None):
        block = TransformerBlock(self.config, self.seq_axis, self.has_residual, parent=None)
        run = jax.jit(lambda params, *inputs: block.apply({"params": params}, *inputs))  # traced once for all blocks
        params, residuals, control_of = self.variables["params"], [], {}
        for number in range(self.config.num_layers):
            identity = None if perturbed is None else perturbed[number]
            own_text = text[number] if isinstance(text, tuple) else text
            x, residual = run(params[str(number)], x, own_text, text_mask, modulation, identity)
            if number == 0 and control is not None:
                arrays, place = control(x)
                control_of = {place + copy: array for copy, array in enumerate(arrays)}
            x = x + control_of[number] if number in control_of else x
            residuals.append(residual)
        return x, residuals


def cross_attention(config: TransformerConfig, name: str | None = None) -> CrossAttention:
    """The layer of a block that reads the text."""
    c = config
    return CrossAttention(
        c.width, c.num_cross_attention_heads, c.qk_norm, c.cross_norm_eps, jnp.dtype(c.dtype), name=name
    )


@recomputed
def modulated_norm(
    x: Float[Array, "B H W C"], shift: Float[Array, "B 1 1 C"], scale: Float[Array, "B 1 1 C"]
) -> Float[Array, "B H W C"]:
    """Adaptive layer norm: LN(x) * (1 + scale) + shift, eps 1e-6, no affine parameters; float32 inside."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)
    return (y * (1 + scale) + shift).astype(x.dtype)


@recomputed
def add_gated(
    x: Float[Array, "B H W C"], gate: Float[Array, "B 1 1 C"], y: Float[Array, "B H W C"]
) -> Float[Array, "B H W C"]:
    """x + gate * y, float32 inside."""
    return (x + gate * y).astype(x.dtype)


def flatten_grid(x: Float[Array, "B H W C"]) -> Float[Array, "B N C"]:
    """Row-major tokens of a grid."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _asked(implementation: str) -> str | None:
    return None if implementation == "auto" else implementation


def modulation_rows(table: Float[Array, "R C"], condition: Float[Array, "B *R C"]) -> list[Float[Array, "B 1 1 C"]]:
    """The rows of table + condition, float32."""
    rows = table.astype(jnp.float32) + condition.astype(jnp.float32)
    return [rows[:, index, None, None] for index in range(table.shape[0])]


def table_init(key, shape, dtype=jnp.float32):
    """Normal with the standard deviation 1 / sqrt(width)."""
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5
