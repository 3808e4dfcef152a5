"""Dense layers of our models: `nn.Dense` with the derivative of `kernels.dense`, and several of them as one."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.kernels.dense.api import dense, dense_parts
from sana_jax.models.placement import gathered
from sana_jax.models.remat import PRODUCT, checkpoint_name


class Dense(nn.Module):
    """A linear map of the last axis; parameters as in `nn.Dense`."""

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B F"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        return checkpoint_name(dense(x.astype(self.dtype), gathered(kernel), bias), PRODUCT)


class StackedDense(nn.Module):
    """Several linear maps of the same input, with one kernel [C, count, features] that is gathered at once."""

    count: int
    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> tuple[Float[Array, "*B F"], ...]:
        shape = (x.shape[-1], self.count, self.features)
        kernel = gathered(self.param("kernel", _stacked_xavier, shape).astype(self.dtype))
        bias = self.param("bias", nn.initializers.zeros, shape[1:]) if self.use_bias else None
        return checkpoint_name(dense_parts(x.astype(self.dtype), kernel, bias), PRODUCT)


def _stacked_xavier(key, shape, dtype=jnp.float32):
    # The public code initialises q, k, v as one [3C, C] matrix, hence fan_out = count * features.
    inputs, count, features = shape
    return nn.initializers.xavier_uniform()(key, (inputs, count * features), dtype).reshape(shape)
