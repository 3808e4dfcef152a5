"""Transformers whose large products are made in eight bits (W8A8), weights and activations, with half of bfloat16's bytes.

Quantised are the dense layers of the blocks, which hold nearly all of the parameters. Embeddings, modulation, the depthwise
convolution and the final layer stay as they are. See `sana_jax.kernels.dense.quantized` for the mathematics.
"""

import functools

import jax
import jax.numpy as jnp
from flax import traverse_util

from sana_jax.kernels.dense.quantized import quantize
from sana_jax.models import layers

KINDS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}

LAYERS = tuple(
    ("blocks", *name.split("/"))
    for name in (
        "self_attention/qkv",
        "self_attention/out",
        "cross_attention/query",
        "cross_attention/kv",
        "cross_attention/out",
        "feed_forward/expand",
        "feed_forward/project",
    )
)


def check_kind(kind: str) -> None:
    """Raises ValueError where there is no such way to quantise."""
    if kind not in KINDS:
        raise ValueError(f"quantization={kind!r} is not one of {', '.join(KINDS)}; leave it out for none.")


def is_quantized(params: dict) -> bool:
    """Whether a transformer's parameters come from `quantize_transformer`."""
    return any(path[-1] == "codes" for path in traverse_util.flatten_dict(params))


def quantize_transformer(params: dict, kind: str) -> dict:
    """The parameters of a `SanaTransformer` for the same module, which then calculates in eight bits.

    In place of `kernel` [layers, channels, ..., features] the quantised layers have `codes` [layers, ..., features,
    channels] and a float32 `scale` [layers, ..., features]. All other leaves are the given ones. One parameter after the
    other is quantised, so that besides both trees memory holds the temporaries of one.

    Args:
      params: float parameters, or their shapes under `jax.eval_shape`; blocks that are apart are stacked (`models.layers`).
      kind: "int8", or "fp8" (float8_e4m3fn).

    Raises:
      ValueError: an unknown kind, or parameters that are quantised already.
    """
    check_kind(kind)
    if is_quantized(params):
        raise ValueError("the parameters are quantised already; quantise the float parameters they were made of.")
    flat = traverse_util.flatten_dict(layers.stack(params))
    for layer in LAYERS:
        flat[*layer, "codes"], flat[*layer, "scale"] = _quantize_kernel(flat.pop((*layer, "kernel")), KINDS[kind])
    return traverse_util.unflatten_dict(flat)


@functools.partial(jax.jit, static_argnums=1)
def _quantize_kernel(kernel, dtype):
    return quantize(jnp.moveaxis(kernel, 1, -1), dtype)
