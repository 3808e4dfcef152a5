"""The parameters of repeated layers: stacked on a leading axis, or those of each layer apart.

Files and training have them stacked: one layer is compiled and scanned over them, and gradients and optimizer see one array
in place of twenty. But CPUs and GPUs copy a layer's slice of every stacked kernel before they multiply by it, at every
evaluation (on TPUs the product reads the slice), so that samplers take the layers apart: {"blocks": {"0": {...}, "1": ...}}.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

# Modules whose parameters nn.scan stacks, by name: of the transformer and of the text encoder.
BLOCKS, LAYERS = "blocks", "layers"
SCANNED = (BLOCKS, LAYERS)


def are_apart(params: Mapping) -> bool:
    """Whether these parameters of a model have its layers apart."""
    return any("0" in params.get(name, {}) for name in SCANNED)


def take_apart(params: dict) -> dict:
    """The parameters with the layers apart; works on shapes too, under `jax.eval_shape`.

    `params` is emptied meanwhile, so that memory holds one parameter twice at most, if nothing else holds them.
    """
    if are_apart(params):
        return params
    (name,) = (name for name in SCANNED if name in params)
    flat = traverse_util.flatten_dict(params.pop(name))
    apart = {}
    for path in list(flat):
        for number, array in enumerate(_unstack(flat.pop(path))):
            apart[str(number), *path] = array
    return params | {name: traverse_util.unflatten_dict(apart)}


def stack(params: dict) -> dict:
    """The inverse of `take_apart`, without emptying anything; NumPy arrays stay in the host's memory."""
    return _joined(params, _join)


def list_layers(params: dict) -> dict:
    """As `stack`, but in place of each stacked array a list of its layers, so that nothing is copied."""
    return _joined(params, lambda *arrays: list(arrays))


def _joined(params: dict, join: Callable) -> dict:
    if not are_apart(params):
        return params
    (name,) = (name for name in SCANNED if name in params)
    in_order = [params[name][str(number)] for number in range(len(params[name]))]
    return params | {name: jax.tree.map(join, *in_order)}


def _unstack(x):
    if isinstance(x, np.ndarray):
        return list(x)
    if isinstance(x, jax.core.Tracer) or [device.platform for device in x.devices()] != ["cpu"]:
        return _cut(x)
    # In the host's memory nothing has to be compiled for it: each layer is a view.
    return jax.device_put(list(np.asarray(x)), x.sharding if x.committed else None)


def _join(*arrays):
    return (np if isinstance(arrays[0], np.ndarray) else jnp).stack(arrays)


@jax.jit
def _cut(x):
    return jnp.unstack(x)
