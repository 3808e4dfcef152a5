"""The noise that pictures are drawn from."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key


def initial_noise(
    seed: int | Sequence[int], indices: Sequence[int] | Int[np.ndarray, " B"], shape: tuple[int, int, int]
) -> Float[Array, "B h w C"]:
    """Standard normal noise for the pictures numbered `indices`: each a function of (seed, its number) alone.

    So a picture stays the same whichever others are drawn beside it, and a long list can be cut into batches. `seed`: of
    all pictures, or one of each.
    """
    indices = jnp.asarray(indices)
    return _noise(keys_of(seed, len(indices)), indices, shape)


def keys_of(seed: int | Sequence[int], count: int) -> Key[Array, " {count}"]:
    """The random key of each of `count` pictures, of one seed for all or one of each."""
    return jax.vmap(jax.random.key)(np.broadcast_to(np.asarray(seed, np.uint32), count))


@functools.partial(jax.jit, static_argnames="shape")
def _noise(keys, indices, shape):
    return jax.vmap(lambda key, index: jax.random.normal(jax.random.fold_in(key, index), shape))(keys, indices)
