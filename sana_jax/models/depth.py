"""Depth growth and pruning of a transformer: from the blocks of one model those of a deeper or shallower one."""

import fnmatch
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array

# How a new block's parameters begin, the first pattern that fits winning: (pattern, mean, standard deviation). Each residual branch
# ends in a layer of zeros.
_NEW = (
    ("*_attention/norm_*/scale", 1.0, 0.0),
    ("*_attention/out/*", 0.0, 0.0),
    ("*_attention/*/bias", 0.0, 0.0),
    ("feed_forward/project/*", 0.0, 0.0),
    ("feed_forward/depthwise/*", 0.0, 0.2),
    ("*", 0.0, 0.02),
)


def with_depth(blocks: dict, kept: Sequence[int], num_layers: int, key: Array) -> dict:
    """Blocks of a model of `num_layers`: the `kept` ones of another, in that order, and then new ones that change nothing.

    With fewer than there were it is pruning (SANA-1.5, section 2.3). With more it is the paper's "partial preservation"
    (section 2.1), whose new blocks are the identity: the deeper model computes at first what the kept blocks do.

    Args:
      blocks: the transformer's, stacked on a leading layer axis.
      kept: numbers of its blocks, from 0.
      num_layers: no less than those.
      key: of the random numbers in new blocks.
    """
    flat = traverse_util.flatten_dict(blocks, sep="/")
    keys = dict(zip(sorted(flat), jax.random.split(key, len(flat)), strict=True))

    def resized(name, x):
        mean, std = next(law for pattern, *law in _NEW if fnmatch.fnmatchcase(name, pattern))
        new = mean + std * jax.random.normal(keys[name], (num_layers - len(kept), *x.shape[1:]), x.dtype)
        return jnp.concatenate([x[jnp.asarray(kept)], new])

    return traverse_util.unflatten_dict({name: resized(name, x) for name, x in flat.items()}, sep="/")
