"""Depthwise convolution as XLA's grouped convolution."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def depthwise_conv(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"]) -> Float[Array, "B H W C"]:
    r"""$y_{ijc} = \sum_{ab} x_{i+a-r,\,j+b-r,\,c}\,w_{abc}$, r = (k-1)/2, zeros outside the grid (PyTorch's `padding=k//2`)."""
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :].astype(x.dtype),
        window_strides=(1, 1),
        padding=[(size // 2, size // 2) for size in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        preferred_element_type=jnp.result_type(x),
    )
