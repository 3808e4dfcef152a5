"""The noise of a call: given, or drawn from the seed of all pictures or those of each."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sana_jax import arguments
from sana_jax.diffusion import noise, trigflow

Seed = int | tuple[int, ...]


def check_seeds(seed: Any, batch: int) -> tuple[Seed, Int[np.ndarray, " B"]]:
    """The seed of all pictures, or those of each, and the numbers of the pictures under their seeds.

    Raises:
      ValueError: no whole numbers, or neither one nor as many as pictures.
    """
    if not isinstance(seed, list | tuple | range) and not getattr(seed, "ndim", 0):
        return arguments.whole_number("seed", seed), np.arange(batch)
    seeds = arguments.whole_numbers("seed", seed)
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} pictures: give one for all, or one for each.")
    return seeds, np.zeros(batch, np.int32)


def start_noise(
    given: Any, seed: Seed, indices: Int[np.ndarray, " B"], shape: tuple[int, int, int]
) -> Float[Array, "B h w C"]:
    """What the pictures start from: `latents`, or `diffusion.noise.initial_noise`.

    Raises:
      ValueError: it is given in another shape.
    """
    if given is None:
        return noise.initial_noise(seed, indices, shape)
    wanted = (len(indices), *shape)
    if np.shape(given) != wanted:
        raise ValueError(f"latents have the shape {np.shape(given)}; this call needs {wanted} (NHWC).")
    return jnp.asarray(given, jnp.float32)


def step_noise(
    given: Any, seed: Seed, indices: Int[np.ndarray, " B"], steps: int, shape: tuple[int, int, int]
) -> Float[Array, "S B h w C"]:
    """What a Sprint model adds after its steps: `step_noise`, or `diffusion.trigflow.step_noise`.

    Raises:
      ValueError: it is given in another shape.
    """
    if given is None:
        return trigflow.step_noise(seed, indices, steps, shape)
    wanted = (steps - 1, len(indices), *shape)
    if np.shape(given) != wanted:
        raise ValueError(f"step_noise has the shape {np.shape(given)}; this call needs {wanted}.")
    return jnp.asarray(given, jnp.float32)
