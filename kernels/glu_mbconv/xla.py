"""The gated middle of the Mix-FFN in XLA's operations: what CPUs and GPUs run."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from sana_jax.kernels.activations import silu
from sana_jax.kernels.dense.api import sum_positions
from sana_jax.kernels.depthwise_conv.api import depthwise_conv
from sana_jax.kernels.derivatives import custom_vjp


@functools.partial(custom_vjp, nondiff_argnums=(4,))
def gated_depthwise(
    value: Float[Array, "B H W C"],
    gate: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw C2"],
    bias: Float[Array, "C2"],
    row_padding: int,
) -> Float[Array, "B h W C"]:
    """As `api.gated_depthwise`.

    For the derivative the inputs and the convolved grids are kept, and both SiLUs are computed again: these are the widest
    activations of the model, and the activation functions are cheaper than the memory they would take.
    """
    return forward(value, gate, kernel, bias, row_padding)[0]


def forward(value, gate, kernel, bias, row_padding):
    """The value, and what the derivative needs."""
    # The halves are convolved apart, so that nothing of this width is split or joined in the forward pass.
    convolve = functools.partial(depthwise_conv, row_padding=row_padding)
    a, g = (convolve(silu(part), w, b) for part, w, b in _halves(value, gate, kernel, bias))
    return _gate(a, g), (value, gate, kernel, bias, a, g)


def backward(row_padding, residuals, g):
    """Gradients of value, gate, kernel and bias."""
    *inputs, a, b = residuals
    gradients = []
    for (part, w, bias), dy in zip(_halves(*inputs), jax.vjp(_gate, a, b)[1](g), strict=True):
        activated, activation_vjp = jax.vjp(silu, part)
        dx, dw = jax.vjp(functools.partial(depthwise_conv, row_padding=row_padding), activated, w)[1](dy)
        gradients.append((activation_vjp(dx)[0], dw, sum_positions(dy).astype(bias.dtype)))
    parts, kernels, biases = zip(*gradients, strict=True)
    return *parts, jnp.concatenate(kernels, axis=-1), jnp.concatenate(biases, axis=-1)


gated_depthwise.defvjp(forward, backward)


def _halves(value, gate, kernel, bias):
    kernels, biases = (jnp.split(array, 2, axis=-1) for array in (kernel, bias))
    return zip((value, gate), kernels, biases, strict=True)


def _gate(value, gate):
    return (value.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(value.dtype)
