"""What the transformer learns from latents and text features."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sana_jax.sampling.program import Features
from sana_jax.training.state import PyTree


class Objective(NamedTuple):
    """One of `make_flow_matching`, `make_distillation`.

    In what the functions are given, `text` are the features of each picture's caption, `null` those of the empty one, `hint` latents
    of the pictures that guide a ControlNet, or None; keys are random, one for each picture.

    Attributes:
      init: key -> what trains beside the transformer, by name; {} where nothing does.
      losses: (params, frozen, latents, hint, text, null, keys, step) -> (losses [B], metrics).
      heldout: (params, frozen, latents, hint, text, null, keys) -> [B], what is measured of held-out pictures.
      picture_flops: operations of one velocity for one picture -> those of a training step for it.
    """

    init: Callable[[jax.Array], PyTree]
    losses: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    heldout: Callable[..., jax.Array]
    picture_flops: Callable[[int], int]


def null_for(text: Features, null: Features, own_mask: bool) -> Features:
    """The empty caption's features, a row for each row of `text`; with the mask of `text` unless it has its `own`."""
    hidden, mask = (jnp.broadcast_to(x, (text.mask.shape[0], *x.shape[1:])) for x in null)
    return Features(hidden, mask if own_mask else text.mask)


def normal_like(latents: Array, keys: Array) -> Array:
    """Standard normal noise of the latents' shape, of each picture's own key."""
    return jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)
