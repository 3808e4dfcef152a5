"""The parameters of a transformer's blocks: stacked on a leading axis, or those of each block apart.

Files and training have them stacked: one block is compiled and scanned over them, and gradients and optimizer see one
array in place of twenty. But CPUs and GPUs copy a block's slice of every stacked kernel before they multiply by it, at every
evaluation (on TPUs the product reads the slice), so that samplers take the blocks apart: {"blocks": {"0": {...}, "1": ...}}.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import traverse_util

BLOCKS = "blocks"


def are_apart(params: Mapping) -> bool:
    """Whether these parameters of a transformer have its blocks apart."""
    return "0" in params.get(BLOCKS, {})


def take_apart(params: dict) -> dict:
    """The parameters with the blocks apart; works on shapes too, under `jax.eval_shape`.

    `params` is emptied meanwhile, so that memory holds one parameter twice at most, if nothing else holds them.
    """
    if are_apart(params):
        return params
    flat = traverse_util.flatten_dict(params.pop(BLOCKS))
    blocks = {}
    for path in list(flat):
        for number, array in enumerate(_unstack(flat.pop(path))):
            blocks[str(number), *path] = array
    return params | {BLOCKS: traverse_util.unflatten_dict(blocks)}


def stack(params: dict) -> dict:
    """The inverse of `take_apart`, without emptying anything."""
    if not are_apart(params):
        return params
    blocks = params[BLOCKS]
    in_order = [blocks[str(number)] for number in range(len(blocks))]
    return params | {BLOCKS: jax.tree.map(lambda *arrays: jnp.stack(arrays), *in_order)}


@jax.jit
def _unstack(x):
    return jnp.unstack(x)
