"""The linear diffusion transformer of SANA, SANA-1.5 and SANA-Sprint."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Num

from sana_jax.kernels.activations import silu
from sana_jax.models.attention import TextKeys
from sana_jax.models.conditioning import (
    SMALL_NORMAL,
    CaptionProjection,
    ScalarEmbedder,
    grid_coordinates,
    position_table,
)
from sana_jax.models.dense import Dense
from sana_jax.models.layers import BLOCKS, are_apart
from sana_jax.models.placement import over_batch
from sana_jax.models.row_split import own_rows, split_count
from sana_jax.models.transformer_block import (
    BlocksApart,
    Residuals,
    TransformerBlock,
    cross_attention,
    modulated_norm,
    modulation_rows,
    scanned_blocks,
    table_init,
)
from sana_jax.models.transformer_config import TransformerConfig

__all__ = ["LOGICAL_AXES", "SanaTransformer", "TransformerConfig", "patchify", "text_keys", "unpatchify"]

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
        control: Callable[[Array], Residuals] | None = None,
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
        table = self.param("scale_shift_table", table_init, (2, c.width))
        shift, scale = modulation_rows(table, condition[:, None])
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
