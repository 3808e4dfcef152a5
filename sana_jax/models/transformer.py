"""The linear diffusion transformer of SANA, SANA-1.5 and SANA-Sprint."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Num

from sana_jax.kernels.activations import silu
from sana_jax.kernels.glu_mbconv.api import IMPLEMENTATIONS as MIX_FFN_IMPLEMENTATIONS
from sana_jax.kernels.linear_attention.api import IMPLEMENTATIONS as ATTENTION_IMPLEMENTATIONS
from sana_jax.models.attention import CrossAttention, SelfAttention, TextKeys
from sana_jax.models.conditioning import (
    SMALL_NORMAL,
    CaptionProjection,
    ScalarEmbedder,
    grid_coordinates,
    position_table,
)
from sana_jax.models.dense import Dense
from sana_jax.models.feed_forward import GeluMLP, MixFFN
from sana_jax.models.layers import BLOCKS, are_apart
from sana_jax.models.placement import over_batch
from sana_jax.models.remat import check_remat, checkpoint_name, recomputed, remat
from sana_jax.models.row_split import own_rows, split_count
from sana_jax.models.sizes import check_numbers

REMAT_NAMES = ("attention", "cross_attention", "feed_forward")
BLOCK_OUTPUT = "output"  # of every block, kept where the call has mutable=["intermediates"]

# Names of the parameters' axes, by path (see `parallel.sharding`, which maps them to mesh axes).
LOGICAL_AXES = {
    "patch_embed/kernel": (None, "embed"),
    "*/linear_1/kernel": (None, "embed"),
    "*/linear_2/kernel": ("embed", None),
    "modulation/kernel": ("embed", None),
    "blocks/self_attention/qkv/kernel": ("layers", "embed", None, None),
    "blocks/cross_attention/query/kernel": ("layers", "embed", None),
    "blocks/cross_attention/kv/kernel": ("layers", "embed", None, None),
    "blocks/*_attention/out/kernel": ("layers", None, "embed"),
    "blocks/feed_forward/expand/kernel": ("layers", "embed", "mlp"),
    "blocks/feed_forward/depthwise/kernel": ("layers", None, None, "mlp"),
    "blocks/feed_forward/project/kernel": ("layers", "mlp", "embed"),
    "proj_out/kernel": ("embed", None),
    # Quantised layers: the kernel's codes, with the summed axis last, and their scales.
    "blocks/self_attention/qkv/codes": ("layers", None, None, "embed"),
    "blocks/cross_attention/query/codes": ("layers", None, "embed"),
    "blocks/cross_attention/kv/codes": ("layers", None, None, "embed"),
    "blocks/*_attention/out/codes": ("layers", "embed", None),
    "blocks/feed_forward/expand/codes": ("layers", "mlp", "embed"),
    "blocks/feed_forward/project/codes": ("layers", "embed", "mlp"),
    # Factors of low rank (`training.lora`): small.
    "blocks/*/lora_*": None,
    "*scale_shift_table": None,
    "*/scale": None,
    "*/bias": None,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and switches of a `SanaTransformer`. Presets of the public models are in `presets.py`.

    Attributes:
      sample_size: side of the square latent grid the model was trained at; only the position table depends on it.
      patch_size: latent pixels per token side.
      in_channels, out_channels: latent channels.
      width: channels of the residual stream.
      num_layers: number of blocks.
      attention_head_dim: channels per self-attention head.
      num_cross_attention_heads: heads of the attention to the text.
      caption_channels: channels of the text features.
      mlp_ratio: hidden width of the feed-forward layer over `width`, rounded down.
      qk_norm: RMSNorm on queries and keys of both attentions (SANA-1.5, Sprint).
      guidance_embeds: the call takes a guidance scale and embeds it (Sprint).
      guidance_embeds_scale: factor on that guidance scale.
      timestep_scale: factor on the timestep (0..1000) before it is embedded; 0.001 for Sprint.
      integer_timesteps: truncate timesteps before they are scaled, as the stock models were trained.
      interpolation_scale: of the position table; None for the models without one.
      self_attention: "linear", or "softmax" as an ablation.
      feed_forward: "mix_ffn", or "gelu_mlp" as an ablation.
      attention_implementation: of the linear attention, one of `kernels.linear_attention`'s; "auto" lets the platform choose.
      feed_forward_implementation: likewise of the Mix-FFN's middle, one of `kernels.glu_mbconv`'s.
      attention_eps: of the linear attention; 1e-15 in diffusers, 1e-8 in the original code.
      cross_norm_eps: of the cross-attention's q and k norm; 1e-5 in diffusers, 1e-6 in the original code.
      clamp_fp16: clip the self-attention output to +-65504, which the fp16 checkpoints need at any precision.
      remat: what the backward pass computes again, "none" to "full"; see `models.remat`.
      unroll: blocks per step of the scan. More make a larger program, which CPUs run faster: a training step of the
        embedded model takes 11.6 ms a picture with all 6 in one step and 18.1 ms with one.
      dtype: of the computation. Parameters are float32; sums, norms and softmax are computed in float32.
    """

    sample_size: int = 32
    patch_size: int = 1
    in_channels: int = 32
    out_channels: int = 32
    width: int = 2240
    num_layers: int = 20
    attention_head_dim: int = 32
    num_cross_attention_heads: int = 20
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    qk_norm: bool = False
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    timestep_scale: float = 1.0
    integer_timesteps: bool = True
    interpolation_scale: float | None = None
    self_attention: str = "linear"
    feed_forward: str = "mix_ffn"
    attention_implementation: str = "auto"
    feed_forward_implementation: str = "auto"
    attention_eps: float = 1e-15
    cross_norm_eps: float = 1e-5
    clamp_fp16: bool = False
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    def __post_init__(self):
        check_numbers(
            self,
            counts=("sample_size", "patch_size", "in_channels", "out_channels", "width", "num_layers", "attention_head_dim",
                    "num_cross_attention_heads", "caption_channels", "unroll"),
            factors=("mlp_ratio", "guidance_embeds_scale", "timestep_scale", "interpolation_scale", "attention_eps",
                     "cross_norm_eps"),
        )  # fmt: skip
        for name in ("attention_head_dim", "num_cross_attention_heads"):
            if self.width % getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} does not divide width={self.width}; every head must have the same "
                    f"number of channels. Use a divisor of {self.width}."
                )
        if self.interpolation_scale is not None and self.width % 4:
            raise ValueError(
                f"width={self.width} is not a multiple of 4, which the position table needs (sine and cosine of two "
                f"axes). Use width={self.width // 4 * 4} or interpolation_scale=None."
            )
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} does not divide sample_size={self.sample_size}. Use a divisor of it."
            )
        choices = {
            "self_attention": ("linear", "softmax"),
            "feed_forward": ("mix_ffn", "gelu_mlp"),
            "attention_implementation": ("auto", *ATTENTION_IMPLEMENTATIONS),
            "feed_forward_implementation": ("auto", *MIX_FFN_IMPLEMENTATIONS),
            "dtype": ("float32", "bfloat16", "float16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}.")
        if self.self_attention == "softmax" and self.attention_implementation != "auto":
            raise ValueError(
                f"attention_implementation={self.attention_implementation!r} is of linear attention, and "
                "self_attention='softmax'. Use 'auto'."
            )
        if self.feed_forward == "gelu_mlp" and self.feed_forward_implementation != "auto":
            raise ValueError(
                f"feed_forward_implementation={self.feed_forward_implementation!r} is of the Mix-FFN, and "
                "feed_forward='gelu_mlp'. Use 'auto'."
            )
        check_remat(self.remat, REMAT_NAMES)


class SanaTransformer(nn.Module):
    """Predicts the flow velocity (noise - data) of noisy latents, given timesteps and text features (SANA section 2.2).

    With `seq_axis` the call works on some rows of the latents, inside `jax.shard_map` (`parallel.transformer`).
    """

    config: TransformerConfig
    seq_axis: str | None = None

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B H W Cin"],
        timesteps: Num[Array, "B"],
        text_features: Float[Array, "P L D"] | TextKeys | tuple[TextKeys, ...],
        text_mask: Num[Array, "P L"] | Bool[Array, "P L"],
        guidance: Float[Array, "B"] | None = None,
        perturbed: Bool[Array, "N B"] | None = None,
        control: Callable[[Array], "Residuals"] | None = None,
    ) -> Float[Array, "B H W Cout"]:
        """Velocity in float32.

        Args:
          latents: noisy latents, scaled by the autoencoder's scaling factor.
          timesteps: 1000 * sigma, in 0..1000.
          text_features: hidden states of the text encoder, or what `text_keys` made of them. P divides B: the pictures
            of a text are next to each other.
          text_mask: true (or non-zero) where a text token is to be seen.
          guidance: guidance scale; only and always for models with `guidance_embeds`.
          perturbed: true where a block's self-attention is the identity on a picture's values, for perturbed attention
            guidance. None: nowhere, and nothing of it is compiled.
          control: output of block 0, [B, h, w, C] -> what is added between blocks, of a ControlNet (`controlnet.control`).

        Raises:
          ValueError: the grid is no multiple of the patch size, P does not divide B, or guidance is missing or superfluous.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        check_inputs(c, latents, text_mask, guidance)

        x = Dense(c.width, dtype=dtype, name="patch_embed")(patchify(over_batch(latents), c.patch_size))
        if c.interpolation_scale is not None:
            x = x + self._position_table(*x.shape[1:3]).astype(dtype)

        t = jnp.trunc(timesteps) if c.integer_timesteps else timesteps
        condition = ScalarEmbedder(c.width, dtype=dtype, name="time_embed")(t * c.timestep_scale)
        if c.guidance_embeds:
            embedder = ScalarEmbedder(c.width, zero_output=True, dtype=dtype, name="guidance_embed")
            condition = condition + embedder(guidance * c.guidance_embeds_scale)
        modulation = Dense(6 * c.width, kernel_init=SMALL_NORMAL, dtype=dtype, name="modulation")(silu(condition))
        text = text_features
        if not isinstance(text, tuple):
            text = CaptionProjection(c.width, dtype=dtype, name="caption")(over_batch(text))

        params = self.variables.get("params", {})
        inputs = text, text_mask != 0, modulation.reshape(-1, 6, c.width), perturbed
        if are_apart(params):
            x = BlocksApart(c, self.seq_axis, name=BLOCKS)(x, *inputs, control=control)[0]
        else:
            blocks, added = scanned_blocks(c, isinstance(text, TextKeys)), (None, None)
            if control is not None:
                residuals = control(self._after_first_block(params[BLOCKS], x, *inputs))
                added = residuals.arrays, jnp.arange(c.num_layers) - residuals.first
            x = blocks(c, self.seq_axis, name=BLOCKS)(x, *inputs, *added)[0]

        # The final layer takes the plain condition, not the modulation vector the blocks share.
        table = self.param("scale_shift_table", _table_init, (2, c.width))
        shift, scale = _modulation_rows(table, condition[:, None])
        x = modulated_norm(x, shift, scale)
        outputs = c.patch_size**2 * c.out_channels
        x = Dense(outputs, dtype=dtype, name="proj_out")(x)
        return unpatchify(x, c.patch_size).astype(jnp.float32)

    def _after_first_block(self, params, x, text, text_mask, modulation, perturbed):
        """Its output, where somebody reads that; the scan computes it again."""
        first = functools.partial(jax.tree.map, lambda stacked: stacked[0])
        block = TransformerBlock(self.config, self.seq_axis, parent=None)
        own_text = first(text) if isinstance(text, TextKeys) else text
        return block.apply({"params": first(params)}, x, own_text, text_mask, modulation, first(perturbed))[0]

    def _position_table(self, height: int, width: int) -> Float[Array, "height width C"]:
        c, axis = self.config, self.seq_axis
        coordinates = functools.partial(
            grid_coordinates, base_size=c.sample_size // c.patch_size, interpolation_scale=c.interpolation_scale
        )
        rows = own_rows(coordinates(height * split_count(axis)), axis)
        return position_table(rows, coordinates(width), c.width)


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
        table = self.param("scale_shift_table", _table_init, (6, c.width))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _modulation_rows(table, modulation)

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


def text_keys(
    config: TransformerConfig, params: dict, text_features: Float[Array, "P L D"]
) -> TextKeys | tuple[TextKeys, ...]:
    """What each block reads of the text, for a sampler to calculate once and not at every step.

    Args:
      config: of the transformer.
      params: its parameters; the keys are stacked or by block as these are (`models.layers`).
      text_features: hidden states of the text encoder.
    """
    caption = CaptionProjection(config.width, dtype=jnp.dtype(config.dtype))
    text = caption.apply({"params": params["caption"]}, over_batch(text_features))
    attention = cross_attention(config)

    def keys(params):
        return attention.apply({"params": params}, text, method="keys")

    if not are_apart(params):
        return jax.lax.map(keys, params[BLOCKS]["cross_attention"])
    keys = jax.jit(keys)  # traced once for all blocks
    return tuple(keys(params[BLOCKS][str(number)]["cross_attention"]) for number in range(config.num_layers))


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


def patchify(x: Float[Array, "B H W C"], patch: int) -> Float[Array, "B h w P"]:
    """Tokens' channels are ordered (row in patch, column in patch, latent channel)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // patch, width // patch, -1)


def unpatchify(x: Float[Array, "B h w P"], patch: int) -> Float[Array, "B H W C"]:
    """Inverse of `patchify`."""
    batch, height, width = x.shape[:3]
    x = x.reshape(batch, height, width, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * patch, width * patch, -1)


def flatten_grid(x: Float[Array, "B H W C"]) -> Float[Array, "B N C"]:
    """Row-major tokens of a grid."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def check_inputs(config: TransformerConfig, latents, text_mask, guidance) -> None:
    """Raises a ValueError that names the first input the configuration does not allow."""
    batch, height, width, channels = latents.shape
    texts = text_mask.shape[0]
    if batch % texts:
        raise ValueError(
            f"{texts} texts do not divide {batch} latents; give each text as many latents, next to each other."
        )
    if height % config.patch_size or width % config.patch_size:
        raise ValueError(
            f"latents are {height}x{width}, which patch_size={config.patch_size} does not divide; crop or resize them."
        )
    if channels != config.in_channels:
        raise ValueError(f"latents have {channels} channels and the model takes {config.in_channels}.")
    if config.guidance_embeds != (guidance is not None):
        given, fix = ("no guidance", "pass guidance [B]") if guidance is None else ("guidance", "leave it out")
        raise ValueError(f"guidance_embeds={config.guidance_embeds} but the call gives {given}; {fix}.")


def _asked(implementation: str) -> str | None:
    return None if implementation == "auto" else implementation


def _modulation_rows(table: Float[Array, "R C"], condition: Float[Array, "B *R C"]) -> list[Float[Array, "B 1 1 C"]]:
    rows = table.astype(jnp.float32) + condition.astype(jnp.float32)
    return [rows[:, index, None, None] for index in range(table.shape[0])]


def _table_init(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5
