"""ControlNet (Zhang et al., 2023, arXiv 2302.05543): copies of a transformer's first blocks train, with pictures that guide them.

The transformer's own weights stay. The layers between the copies and it are zero at the start, so that the first step draws what the
transformer draws alone. `models.controlnet` computes them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Key

from sana_jax.models.controlnet import ControlNetConfig, SanaControlNet
from sana_jax.models.layers import BLOCKS
from sana_jax.models.transformer import TransformerConfig
from sana_jax.training.settings import model_config
from sana_jax.training.state import PyTree
from sana_jax.weights import controlnet_files, native_files, parts


def controlnet_config(config) -> ControlNetConfig:
    """That of `config.controlnet`, of the transformer `config.model`.

    Raises:
      ValueError: there are ControlNets of no such transformer, or not of so many blocks.
    """
    section = config.controlnet
    base = model_config(TransformerConfig, config.model, config.dtype, "model")
    if not section.num_layers < base.num_layers:
        raise ValueError(
            f"controlnet.num_layers={section.num_layers} blocks are copied of model.num_layers={base.num_layers}, and what the last "
            f"copy adds goes into the block after it. Use {base.num_layers - 1} or less."
        )
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    fields |= {"num_layers": section.num_layers, "unroll": min(base.unroll, section.num_layers)}
    if section.wiring == "original":
        fields["interpolation_scale"] = None  # the stream that the branch begins at has the position table already
    try:
        return ControlNetConfig(**fields, wiring=section.wiring)
    except ValueError as error:
        raise ValueError(
            f"config.controlnet: {error} Or, of a model with a position table, use controlnet.wiring=original."
        ) from error


def first_guided(config: ControlNetConfig) -> int:
    """How many of the transformer's first blocks are given nothing of what the ControlNet adds."""
    return 1 if config.wiring == "original" else 2


def init(key: Key[Array, ""], net: SanaControlNet) -> PyTree:
    """Parameters at random, in place of which a run begins with those of `copied` or `load`."""
    inputs = [jnp.zeros(shape) for shape in parts.CONTROLNET.inputs(net.config)]
    return net.init(key, *inputs)["params"]


def copied(config, shapes: PyTree, places: PyTree) -> PyTree:
    """Parameters to begin with, of the transformer at `config.init_from`: its own, and zeros.

    Args:
      shapes, places: of the ControlNet's parameters, shapes and shardings.
    """
    flat, flat_places = traverse_util.flatten_dict(shapes), traverse_util.flatten_dict(places)
    base = parts.find(parts.TRANSFORMER, config.init_from)
    read = {path: flat_places.get(path) for path in traverse_util.flatten_dict(parts.abstract_params(base.module))}
    spare = next(iter(flat_places.values()))  # of what is read and not copied, only the mesh matters
    whole = jax.sharding.NamedSharding(spare.mesh, jax.sharding.PartitionSpec())
    read = traverse_util.unflatten_dict({path: place or whole for path, place in read.items()})
    weights = traverse_util.flatten_dict(parts.read(base, shardings=read)[1])

    def begin(weights):
        found = {}
        for path, shape in flat.items():
            if path not in weights:
                found[path] = jnp.zeros(shape.shape, shape.dtype)
            else:
                found[path] = weights[path][: shape.shape[0]] if path[0] == BLOCKS else weights[path]
        return found

    return traverse_util.unflatten_dict(jax.jit(begin, out_shardings=flat_places)(weights))


def load(config, places: PyTree) -> PyTree:
    """The parameters of the ControlNet at `config.controlnet.init_from`, which `start.check_start` has compared."""
    return parts.read(find(config), shardings=places)[1]


def find(config) -> parts.Source:
    """The ControlNet at `config.controlnet.init_from`, connected as it says itself. Errors as of `controlnet_files.find`."""
    base = model_config(TransformerConfig, config.model, config.dtype, "model")
    native = native_files.find_file(config.controlnet.init_from) is not None
    return controlnet_files.find(config.controlnet.init_from, base, "original" if native else None)
