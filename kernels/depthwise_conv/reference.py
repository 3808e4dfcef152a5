"""Depthwise convolution as XLA's grouped convolution."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def depthwise_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"], row_padding: int
) -> Float[Array, "B h W C"]:
    r"""$y_{ijc} = \sum_{ab} x_{i+a-p,\,j+b-r,\,c}\,w_{abc}$, zeros outside the grid; p = `row_padding`, r = (kw-1)/2.

    With p = (kh-1)/2 the output has the rows of x (PyTorch's `padding=k//2`); in general h = H + 2p - kh + 1.
    """
    columns = kernel.shape[1] // 2
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :].astype(x.dtype),
        window_strides=(1, 1),
        padding=[(row_padding, row_padding), (columns, columns)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        preferred_element_type=jnp.result_type(x),
    )
