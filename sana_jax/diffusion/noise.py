"""The noise that pictures are drawn from."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def initial_noise(
    seed: int, indices: Sequence[int] | Int[np.ndarray, " B"], shape: tuple[int, int, int]
) -> Float[Array, "B h w C"]:
    """Standard normal noise for the pictures numbered `indices`: each a function of (seed, its number) alone.

    So a picture stays the same whichever others are drawn beside it, and a long list can be cut into batches.
    """
    return _noise(jax.random.key(seed), jnp.asarray(indices), shape)


@functools.partial(jax.jit, static_argnames="shape")
def _noise(key, indices, shape):
    return jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), shape))(indices)
