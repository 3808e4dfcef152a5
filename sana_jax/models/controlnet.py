"""ControlNet of a SANA: a copy of the first blocks that sees a picture (edges, depth, ...) and adds to the stream of the others."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Num

from sana_jax.kernels.activations import silu
from sana_jax.models import transformer
from sana_jax.models.attention import TextKeys
from sana_jax.models.conditioning import SMALL_NORMAL, CaptionProjection, ScalarEmbedder
from sana_jax.models.dense import Dense
from sana_jax.models.layers import BLOCKS, are_apart
from sana_jax.models.placement import over_batch
from sana_jax.models.transformer import patchify
from sana_jax.models.transformer_block import BlocksApart, Residuals, scanned_blocks
from sana_jax.models.transformer_config import TransformerConfig

LOGICAL_AXES = transformer.LOGICAL_AXES | {
    "hint/kernel": (None, "embed"),
    "blocks/residual/kernel": ("layers", None, "embed"),
}
WIRINGS = ("diffusers", "original")


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(TransformerConfig):
    """Shape and switches of a `SanaControlNet`: those of the transformer that it was copied from.

    Attributes:
      num_layers: number of copied blocks.
      wiring: where the branch begins and ends; the two public implementations draw different pictures. "original", as the public
        ControlNets were trained: it begins at the output of the transformer's block 0, and copy i adds to the output of block i.
        "diffusers": it begins at the embedded latents, and copy i adds to the output of block i + 1.
    """

    num_layers: int = 7
    wiring: str = "diffusers"

    def __post_init__(self):
        super().__post_init__()
        if self.wiring not in WIRINGS:
            raise ValueError(f"wiring={self.wiring!r} is unknown; use one of {', '.join(WIRINGS)}.")
        for name in ("guidance_embeds", "interpolation_scale"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: ControlNets are of models without it.")


class SanaControlNet(nn.Module):
    """Residuals for the transformer's stream, of noisy latents and of the latents of a picture that guides them.

    Of each copied block one, by a layer that begins at zero (arXiv 2302.05543; for transformers PixArt-delta, 2401.05252).
    `seq_axis`: as the transformer's.
    """

    config: ControlNetConfig
    seq_axis: str | None = None

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B H W Cin"],
        timesteps: Num[Array, "B"],
        hint: Float[Array, "P H W Cin"],
        text_features: Float[Array, "P L D"] | TextKeys | tuple[TextKeys, ...],
        text_mask: Num[Array, "P L"] | Bool[Array, "P L"],
        stream: Float[Array, "B h w C"] | None = None,
    ) -> Sequence[Float[Array, "B h w C"]] | Float[Array, "N B h w C"]:
        """Residuals in the compute dtype.

        Args:
          latents, timesteps, text_features, text_mask: as of `SanaTransformer`; keys by `text_keys` with this model's parameters.
          hint: latents of the guiding picture, scaled as `latents` are, of every text.
          stream: what the branch begins at, with wiring "original"; None: the embedded latents.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        embed = Dense(c.width, dtype=dtype, name="patch_embed")
        x = embed(patchify(over_batch(latents), c.patch_size))
        x = x if stream is None else stream
        hint = Dense(c.width, kernel_init=nn.initializers.zeros, dtype=dtype, name="hint")(
            embed(patchify(hint, c.patch_size))
        )
        x = x + jnp.repeat(hint, x.shape[0] // hint.shape[0], axis=0)

        t = jnp.trunc(timesteps) if c.integer_timesteps else timesteps
        condition = ScalarEmbedder(c.width, dtype=dtype, name="time_embed")(t * c.timestep_scale)
        modulation = Dense(6 * c.width, kernel_init=SMALL_NORMAL, dtype=dtype, name="modulation")(silu(condition))
        text = text_features
        if not isinstance(text, tuple):
            text = CaptionProjection(c.width, dtype=dtype, name="caption")(over_batch(text))
        inputs = x, text, text_mask != 0, modulation.reshape(-1, 6, c.width), None
        if are_apart(self.variables.get("params", {})):
            return BlocksApart(c, self.seq_axis, has_residual=True, name=BLOCKS)(*inputs)[1]
        blocks = scanned_blocks(c, isinstance(text, TextKeys))
        return blocks(c, self.seq_axis, has_residual=True, name=BLOCKS)(*inputs, None, None)[1]


class Branch(NamedTuple):
    """What a ControlNet adds to a call of the transformer, but for what that call is given.

    Attributes:
      net, params: the ControlNet; `params` stacked or by block, as the transformer's.
      strength: factor on what it adds.
      hint, text: see `SanaControlNet`.
    """

    net: SanaControlNet
    params: dict
    strength: Float[Array, ""] | float
    hint: Float[Array, "P H W Cin"]
    text: Float[Array, "P L D"] | TextKeys | tuple[TextKeys, ...]


def control(
    branch: Branch,
    latents: Float[Array, "B H W Cin"],
    timesteps: Num[Array, "B"],
    text_mask: Num[Array, "P L"] | Bool[Array, "P L"],
) -> Callable[[Float[Array, "B h w C"]], Residuals]:
    """`control` of the transformer's call with these inputs."""
    net, params, strength, hint, text = branch
    original = net.config.wiring == "original"

    def residuals(stream):
        inputs = {"params": params}, latents, timesteps, hint, text, text_mask
        found = net.apply(*inputs, stream=stream if original else None)
        return Residuals(jax.tree.map(lambda x: (strength * x).astype(x.dtype), found), 0 if original else 1)

    return residuals
