"""What tells the diffusion transformer about noise level, guidance, text and position."""

import math

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from sana_jax.kernels.activations import gelu, silu
from sana_jax.models.dense import Dense

FREQUENCY_CHANNELS = 256
SMALL_NORMAL = nn.initializers.normal(0.02)


def sinusoidal_embedding(t: Float[Array, "B"], channels: int = FREQUENCY_CHANNELS) -> Float[Array, "B channels"]:
    r"""$[\cos(t\omega_i) \mid \sin(t\omega_i)]$ with $\omega_i = 10000^{-2i/channels}$, in float32. The cosines come first."""
    half = channels // 2
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(-math.log(10000.0) * jnp.arange(half) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def grid_coordinates(tokens: int, *, base_size: int, interpolation_scale: float) -> Float[Array, "tokens"]:
    r"""$p_i = i \cdot base / n / s$ on an axis of n tokens: every grid spans the range of the training grid, which has
    `base_size` tokens, divided by `interpolation_scale` s (1 at 2K, 2 at 4K).
    """
    return jnp.arange(tokens) * (base_size / tokens / interpolation_scale)


def position_table(rows: Num[Array, "H"], columns: Num[Array, "W"], channels: int) -> Float[Array, "H W channels"]:
    r"""Fixed 2-D sine-cosine table of the 2K and 4K models at the given coordinates (`grid_coordinates`).

    The first half of the channels encodes the **column**, the second the row, each as
    $[\sin(p\omega) \mid \cos(p\omega)]$ with $\omega_i = 10000^{-i/(channels/4)}$.
    """
    omega = 10000.0 ** (-jnp.arange(channels // 4) / (channels / 4))

    def encode(p):
        angles = p[:, None] * omega
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    shape = (rows.shape[0], columns.shape[0], channels // 2)
    rows, columns = encode(rows)[:, None], encode(columns)[None]
    return jnp.concatenate([jnp.broadcast_to(columns, shape), jnp.broadcast_to(rows, shape)], axis=-1)


class ScalarEmbedder(nn.Module):
    """Embeds one number per sample (timestep or guidance scale): sinusoids, then Dense - SiLU - Dense."""

    width: int
    zero_output: bool = False  # Sprint starts its guidance embedding at zero
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t: Float[Array, "B"]) -> Float[Array, "B C"]:
        output_init = nn.initializers.zeros if self.zero_output else SMALL_NORMAL
        x = sinusoidal_embedding(t)
        x = Dense(self.width, kernel_init=SMALL_NORMAL, dtype=self.dtype, name="linear_1")(x)
        return Dense(self.width, kernel_init=output_init, dtype=self.dtype, name="linear_2")(silu(x))


class CaptionProjection(nn.Module):
    """Text features to the model's width: Dense - GELU - Dense - RMSNorm.

    The norm's weight starts at 0.01: without it, language-model features of large variance make training diverge (SANA
    section 2.3).
    """

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, text: Float[Array, "B L D"]) -> Float[Array, "B L C"]:
        x = Dense(self.width, kernel_init=SMALL_NORMAL, dtype=self.dtype, name="linear_1")(text)
        x = Dense(self.width, kernel_init=SMALL_NORMAL, dtype=self.dtype, name="linear_2")(gelu(x))
        scale_init = nn.initializers.constant(0.01)
        return nn.RMSNorm(epsilon=1e-5, scale_init=scale_init, dtype=self.dtype, name="norm")(x)
