"""Classifier-free guidance: how strongly the prompt pulls on the velocity."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.diffusion.flow import TIMESTEPS


def classifier_free_guidance(
    model_fn: Callable,
    conditional: Any,
    unconditional: Any,
    scale: Float[Array, ""] | float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable:
    r"""Velocity of the guided flow: $v = v_\varnothing + g\,(v_c - v_\varnothing)$ (arXiv 2207.12598).

    Noise and data predictions are affine in v, so that guiding any of the three is the same. Both velocities come from
    one forward pass over a batch of 2B. Outside the guidance interval (arXiv 2404.07724) only the conditional half is
    computed.

    Args:
      model_fn: (latents [B,...], timesteps [B], condition) -> velocity [B,...].
      conditional: tree of arrays with leading axis B: what the prompt is to `model_fn`.
      unconditional: the same tree for the negative or empty prompt.
      scale: guidance scale g; 1 is no guidance, 4.5 is SANA's default.
      interval: noise levels (low, high) between which guidance acts, both included.

    Returns:
      velocity_fn(latents, timesteps), all timesteps of a batch being equal.
    """
    both = jax.tree.map(lambda null, text: jnp.concatenate([null, text]), unconditional, conditional)

    def guided(latents, timesteps):
        velocity = model_fn(jnp.concatenate([latents, latents]), jnp.concatenate([timesteps, timesteps]), both)
        null, text = jnp.split(velocity.astype(jnp.float32), 2)
        return null + scale * (text - null)

    def plain(latents, timesteps):
        return model_fn(latents, timesteps, conditional).astype(jnp.float32)

    low, high = interval
    if low <= 0 and high >= 1:
        return guided

    def inside_only(latents, timesteps):
        inside = (low * TIMESTEPS <= timesteps[0]) & (timesteps[0] <= high * TIMESTEPS)
        return jax.lax.cond(inside, guided, plain, latents, timesteps)

    return inside_only
