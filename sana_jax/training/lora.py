"""LoRA (Hu et al., 2021, arXiv 2106.09685): of the transformer only changes of low rank train, its weights stay as they are.

A dense layer of the blocks with kernel W [C, D] computes x W + scale (x A) B, with A [C, r] random and B [r, D] zero at the
start, as PEFT begins: the first step is the given model's. Projections side by side, [C, k, D], have factors each. The factors
stand beside the kernel, as `lora_down` [layers, C, ..., r] and `lora_up` [layers, ..., r, D]; `models.dense` reads them.
`weights.lora` writes them in the public layout.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Key

from sana_jax import quantization
from sana_jax.models.layers import BLOCKS

LAYERS = tuple("/".join(path[1:]) for path in quantization.LAYERS)  # all large dense layers of the blocks, by module
ATTENTIONS = tuple(name for name in LAYERS if "attention" in name)
OPTIMIZERS = ("adamw", "came")  # Muon takes kernels alone, and factors are too small for eight bits


def init(key: Key[Array, ""], base: dict, rank: int, layers: Sequence[str]) -> dict:
    """Factors to begin with.

    Args:
      key: of the random ones, uniform within 1 / sqrt(C) of 0.
      base: the transformer's parameters, or their shapes.
      rank: r.
      layers: modules of a block, of LAYERS.

    Returns:
      A tree like the transformer's, of float32 arrays, with the factors alone.

    Raises:
      ValueError: a layer is smaller than that rank.
    """
    kernels, factors = traverse_util.flatten_dict(base), {}
    for each, name in zip(jax.random.split(key, len(layers)), layers, strict=True):
        path = (BLOCKS, *name.split("/"))
        count, channels, *beside, features = kernels[*path, "kernel"].shape
        if rank > (most := min(channels, features)):
            raise ValueError(
                f"lora.rank={rank} is more than a kernel of {name}, [{channels}, {features}], can have. Use {most} or less."
            )
        bound = 1 / math.sqrt(channels)
        factors[*path, "lora_down"] = jax.random.uniform(
            each, (count, channels, *beside, rank), minval=-bound, maxval=bound
        )
        factors[*path, "lora_up"] = jnp.zeros((count, *beside, rank, features))
    return traverse_util.unflatten_dict(factors)


def joined(base: dict, factors: dict, scale: float) -> dict:
    """The transformer's parameters with a LoRA in them, for `SanaTransformer.apply`."""
    flat = traverse_util.flatten_dict(factors)
    scaled = {path: scale * x if path[-1] == "lora_up" else x for path, x in flat.items()}
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(base) | scaled)
