"""Flow matching as SANA trains it: a straight path between data and noise, and the velocity along it.

Notation: x0 is data (scaled latents), eps is standard normal noise, sigma in [0, 1] is the noise level, and the network
is told the level as a timestep of 0 to 1000 (`TIMESTEPS * sigma`). Source: SANA (arXiv 2410.10629), section 3.4,
and NVlabs/Sana where that says less.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

AnyArray = Array | np.ndarray  # this arithmetic is the same on either
TIMESTEPS = 1000  # length of the training table of noise levels, and the network's unit of time


def shift_sigma(sigma: Float[AnyArray, "*S"] | float, shift: float) -> Float[AnyArray, "*S"] | float:
    r"""Moves noise levels towards 1 for high resolutions: $\sigma' = s\sigma / (1 + (s-1)\sigma)$.

    A picture with s^2 times the pixels keeps its coarse structure at s times the noise-to-signal ratio
    $\sigma/(1-\sigma)$; multiplying that ratio by s and solving for sigma gives the formula.
    `shift` is 3.0 for the 512 to 2K models and 6.0 at 4K. Fixed points: 0 and 1.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def training_levels(shift: float) -> tuple[np.ndarray, np.ndarray]:
    r"""The table training draws from: $\sigma'_i$ for $\sigma_i = i/1000$, $i = 0..999$, and its integer timesteps.

    Computed in float64, because the timestep is $1000\,\sigma'_i$ truncated: one rounding in float32 would move entries
    that stand next to an integer.

    Returns:
      (sigmas float64 [1000], timesteps int64 [1000]).

    Raises:
      ValueError: `shift` is not a positive finite number.
    """
    check_shift(shift)
    sigmas = shift_sigma(np.arange(TIMESTEPS) / TIMESTEPS, shift)
    return sigmas, (TIMESTEPS * sigmas).astype(np.int64)


def sample_sigmas(
    keys: Key[Array, " B"],
    shift: float,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    integer_timesteps: bool = True,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    r"""Logit-normal noise levels for a training batch.

    $u = \mathrm{sigmoid}(\mathcal N(m, s^2))$, $i = \lfloor 1000\,u \rfloor$: the level is $\sigma'_i$ of
    `training_levels`. The normal law is that of the unshifted index; the shift comes after it.

    Args:
      keys: random keys, one for each level, which is a function of it alone.
      shift: flow shift s > 0 of the resolution that is trained.
      mean, std: of the normal law; 0 and 1 in every published recipe of SANA and SANA-1.5.
      integer_timesteps: truncate the timestep, as the stock models were trained (False for Sprint teachers, whose time
        is continuous).

    Returns:
      (sigma [B] in 0..1, timestep [B] in 0..1000), both float32.
    """
    sigmas, integers = training_levels(shift)
    timesteps = integers if integer_timesteps else TIMESTEPS * sigmas
    u = jax.nn.sigmoid(mean + std * jax.vmap(jax.random.normal)(keys))
    index = jnp.minimum(jnp.floor(TIMESTEPS * u).astype(jnp.int32), TIMESTEPS - 1)
    return jnp.asarray(sigmas, jnp.float32)[index], jnp.asarray(timesteps, jnp.float32)[index]


def interpolate(
    x0: Float[AnyArray, "B H W C"], noise: Float[AnyArray, "B H W C"], sigma: Float[AnyArray, " B"]
) -> Float[AnyArray, "B H W C"]:
    r"""The point on the path from data to noise: $x_\sigma = (1-\sigma)\,x_0 + \sigma\,\epsilon$."""
    sigma = sigma[:, None, None, None]
    return (1 - sigma) * x0 + sigma * noise


def by_level(
    values: Float[Array, " B"], sigma: Float[Array, " B"], bins: int
) -> tuple[Float[Array, "bins"], Float[Array, "bins"]]:
    """Sums of `values`, and their numbers, by noise level: bin i holds the levels from i / bins to (i + 1) / bins."""
    index = jnp.minimum((sigma * bins).astype(jnp.int32), bins - 1)
    members = jax.nn.one_hot(index, bins, dtype=jnp.float32)
    return values @ members, members.sum(0)


def velocity_target(x0: Float[AnyArray, "B H W C"], noise: Float[AnyArray, "B H W C"]) -> Float[AnyArray, "B H W C"]:
    r"""What the network learns to predict: $v = dx_\sigma/d\sigma = \epsilon - x_0$, the same at every level."""
    return noise - x0


def flow_loss(
    velocity: Float[AnyArray, "B H W C"], x0: Float[AnyArray, "B H W C"], noise: Float[AnyArray, "B H W C"]
) -> Float[Array, " B"]:
    r"""Squared error of the predicted velocity, averaged over each sample: mean of $(v_\theta - (\epsilon - x_0))^2$.

    No weight over levels (SANA uses neither SNR nor min-SNR weights). Per sample and in float32, so that the caller can
    average over the batch and also report the loss by noise level.
    """
    error = velocity.astype(jnp.float32) - velocity_target(x0, noise).astype(jnp.float32)
    return jnp.mean(jnp.square(error), axis=(1, 2, 3))


def check_shift(shift: float) -> None:
    if not (np.isfinite(shift) and shift > 0):
        raise ValueError(f"flow shift {shift} is not a positive number; SANA uses 3.0 up to 2K and 6.0 at 4K.")
