"""The gated middle of SANA's Mix-FFN (section 2.2 of SANA): everything between its two 1x1 convolutions."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from sana_jax.kernels.dense.api import sum_positions
from sana_jax.kernels.depthwise_conv.api import depthwise_conv


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gated_depthwise(
    x: Float[Array, "B H W C2"], kernel: Float[Array, "kh kw C2"], bias: Float[Array, "C2"], row_padding: int = 1
) -> Float[Array, "B h W C"]:
    r"""$a\,\mathrm{SiLU}(g)$ with $[a \mid g] = \mathrm{DWConv}(\mathrm{SiLU}(x)) + b$.

    x is the expanded activation [B, H, W, 2h]; the first h channels of the convolved grid are values, the last h gates.
    `row_padding` is that of `depthwise_conv`.

    For the derivative x and the convolved grid are kept, and both SiLUs are computed again: these are the widest
    activations of the model, and the activation functions are cheaper than the memory they would take.
    """
    return _forward(x, kernel, bias, row_padding)[0]


def _forward(x, kernel, bias, row_padding):
    # The halves are convolved apart, so that nothing of this width is split or joined in the forward pass.
    convolve = functools.partial(depthwise_conv, row_padding=row_padding)
    value, gate = (convolve(silu(part), w, b) for part, w, b in _halves(x, kernel, bias))
    return _gate(value, gate), (x, kernel, bias, value, gate)


def _backward(row_padding, residuals, g):
    x, kernel, bias, value, gate = residuals
    gradients = []
    for (part, w, b), dy in zip(_halves(x, kernel, bias), jax.vjp(_gate, value, gate)[1](g), strict=True):
        activated, activation_vjp = jax.vjp(silu, part)
        dx, dw = jax.vjp(functools.partial(depthwise_conv, row_padding=row_padding), activated, w)[1](dy)
        gradients.append((activation_vjp(dx)[0], dw, sum_positions(dy).astype(b.dtype)))
    return tuple(jnp.concatenate(pair, axis=-1) for pair in zip(*gradients, strict=True))


gated_depthwise.defvjp(_forward, _backward)


def _halves(*arrays):
    return zip(*(jnp.split(array, 2, axis=-1) for array in arrays), strict=True)


def silu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """x sigmoid(x), rounded once: in bfloat16 every step would be, and on CPU float32 inside is faster too."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def _gate(value, gate):
    return (value.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(value.dtype)
