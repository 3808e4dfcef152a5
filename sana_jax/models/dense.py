"""Dense layers of our models: `nn.Dense` with the derivative of `kernels.dense`, and several of them as one.

Where a layer is given `codes` and `scale` in place of `kernel` (`sana_jax.quantization`), it calculates in eight bits. Where it is
given `lora_down` and `lora_up` beside `kernel` (`training.lora`), it adds their change of low rank.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.kernels.dense.api import dense, dense_parts
from sana_jax.kernels.dense.quantized import quantized_dense
from sana_jax.models.placement import gathered
from sana_jax.models.remat import PRODUCT, checkpoint_name


class Dense(nn.Module):
    """A linear map of the last axis; parameters as in `nn.Dense`.

    With `parts` above 1 the features come in so many equal parts, see `dense_parts`.
    """

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: jnp.dtype = jnp.float32
    parts: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B F"] | tuple[Float[Array, "*B D"], ...]:
        x, shape = x.astype(self.dtype), (x.shape[-1], self.features)
        kernel = None if _is_quantized(self) else self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        if kernel is None:
            y = _quantized_product(self, x, bias)
            return checkpoint_name(y if self.parts == 1 else tuple(jnp.split(y, self.parts, axis=-1)), PRODUCT)
        kernel = gathered(kernel.astype(self.dtype))
        if self.parts == 1:
            return checkpoint_name(_with_low_rank(self, x, dense(x, kernel, bias)), PRODUCT)
        per_part = self.parts, self.features // self.parts
        bias = None if bias is None else bias.reshape(per_part)
        y = dense_parts(x, kernel.reshape(x.shape[-1], *per_part), bias)
        return checkpoint_name(_with_low_rank(self, x, y), PRODUCT)


class StackedDense(nn.Module):
    """Several linear maps of the same input, with one kernel [C, count, features] that is gathered at once."""

    count: int
    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> tuple[Float[Array, "*B F"], ...]:
        x, shape = x.astype(self.dtype), (x.shape[-1], self.count, self.features)
        kernel = None if _is_quantized(self) else self.param("kernel", _stacked_xavier, shape)
        bias = self.param("bias", nn.initializers.zeros, shape[1:]) if self.use_bias else None
        if kernel is None:
            y = checkpoint_name(_quantized_product(self, x, None if bias is None else bias.reshape(-1)), PRODUCT)
            return tuple(jnp.split(y, self.count, axis=-1))
        y = dense_parts(x, gathered(kernel.astype(self.dtype)), bias)
        return checkpoint_name(_with_low_rank(self, x, y), PRODUCT)


def _is_quantized(layer: nn.Module) -> bool:
    return layer.has_variable("params", "codes")


def _quantized_product(layer: nn.Module, x, bias):
    """The layer's map of x by its codes [..., C] and their scales."""
    codes, scale = (gathered(layer.get_variable("params", name)) for name in ("codes", "scale"))
    return quantized_dense(x, codes.reshape(-1, codes.shape[-1]), scale.reshape(-1), bias)


def _with_low_rank(layer: nn.Module, x, y):
    """What a layer makes of x, one array or its parts, plus x A B where it has such factors."""
    if not layer.has_variable("params", "lora_down"):
        return y
    down, up = (gathered(layer.get_variable("params", name).astype(x.dtype)) for name in ("lora_down", "lora_up"))
    if down.ndim == 3:  # of several maps, [C, count, r] and [count, r, D]
        changes = [dense(hidden, each) for hidden, each in zip(dense_parts(x, down), up, strict=True)]
    else:
        changes = jnp.split(dense(dense(x, down), up), len(y) if isinstance(y, tuple) else 1, axis=-1)
    return tuple(map(jnp.add, y, changes)) if isinstance(y, tuple) else y + changes[0]


def _stacked_xavier(key, shape, dtype=jnp.float32):
    # The public code initialises q, k, v as one [3C, C] matrix, hence fan_out = count * features.
    inputs, count, features = shape
    return nn.initializers.xavier_uniform()(key, (inputs, count * features), dtype).reshape(shape)
