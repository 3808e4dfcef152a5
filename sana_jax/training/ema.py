"""Running average of the weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def ema_decay(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    r"""Decay at update number `step` (from 0): $\min(d, (1 + n) / (10 + n))$.

    The average starts at the random initial weights; the ramp forgets them within some tens of updates, where a
    constant decay of 0.9999 would need 10,000.
    """
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def update_ema(ema, params, decay: Float[Array, ""]):
    r"""$\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta$ with the weights *after* the update.

    The public trainer averages before the update, and so lags by one step; it ships with the average off.
    """
    return jax.tree.map(lambda average, p: average + (1 - decay) * (p - average), ema, params)
