"""Dense layer whose derivative is spelled the way that XLA compiles well on every backend.

What autodiff makes of a dense layer over [B, N, C] inside a scanned block runs on the CPU backend (JAX 0.12, bfloat16) at
5 % of the speed of its forward pass: a product with a transposed operand misses the matrix units, and a bias gradient over
several axes becomes a windowed reduction. Here each product gets its operands in row-major order.

On CPUs products have float32 results, which are rounded after them. With JAX 0.10.2 those with bfloat16 results do not reach the
processor's instructions for bfloat16, and take two to three times as long; with 0.12 they do.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float
from sana_jax.kernels.derivatives import custom_vjp


def dense(
    x: Float[Array, "*B C"], kernel: Float[Array, "C D"], bias: Float[Array, "D"] | None = None
) -> Float[Array, "*B D"]:
    """x @ kernel + bias in the dtype of x, rounded once; the gradients have the dtypes of what they belong to.

    Raises:
      ValueError: the last axis of x is not the first of the kernel.
    """
    if x.shape[-1] != kernel.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} channels and the kernel takes {kernel.shape[0]}; they must agree.")
    y = _affine(x.reshape(*x.shape[: min(1, x.ndim - 1)], -1, x.shape[-1]), kernel, bias)
    return y.reshape(*x.shape[:-1], -1)


@custom_vjp
def _affine(x, kernel, bias):
    rows, kernel = x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype)
    if bias is None:
        y = _product("nc,cd->nd", rows, kernel)
    else:
        y = lax.platform_dependent(rows, kernel, bias, cpu=_wide_sum, tpu=_wide_sum, default=_library_call)
    return y.reshape(*x.shape[:-1], -1)


def _wide_sum(x, kernel, bias):
    return (_wide_product("nc,cd->nd", x, kernel) + bias).astype(x.dtype)


def _library_call(x, kernel, bias):
    return jnp.matmul(x, kernel) + bias.astype(x.dtype)  # XLA makes one cuBLASLt call of it, which rounds once too


def _affine_forward(x, kernel, bias):
    return _affine(x, kernel, bias), (x, kernel, bias)


def _affine_backward(residuals, g):
    x, kernel, bias = residuals
    # In bfloat16 pictures and tokens stay two axes: XLA's CPU backend then lays the operands out for its fast product, where
    # with one axis it would fold the transpositions into the product and fall back to a float32 routine. In float32 that
    # routine is the better one for the kernel's gradient, and no transposed x is made for it.
    dx = _product("...d,cd->...c", g, kernel.astype(g.dtype))
    if x.dtype == jnp.float32:
        dw = x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1])
    else:
        dw = _product("...c,...d->cd", x, g)
    return dx, dw.astype(kernel.dtype), None if bias is None else sum_positions(g).astype(bias.dtype)


_affine.defvjp(_affine_forward, _affine_backward)


def _product(indices: str, a, b):
    """Of two arrays of one dtype, in that dtype.

    In float32 there is nothing to choose, and the choice does harm: with it in a training step, JAX 0.10.2 ran collectives of
    several CPU processes out of order (tests/distributed/test_processes.py).
    """

    def on_cpu(a, b):
        return _wide_product(indices, a, b).astype(a.dtype)

    elsewhere = functools.partial(jnp.einsum, indices)
    return elsewhere(a, b) if a.dtype == jnp.float32 else lax.platform_dependent(a, b, cpu=on_cpu, default=elsewhere)


def _wide_product(indices: str, a, b):
    return jnp.einsum(indices, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def dense_parts(
    x: Float[Array, "*B C"], kernel: Float[Array, "C P D"], bias: Float[Array, "P D"] | None = None
) -> tuple[Float[Array, "*B D"], ...]:
    """Several dense layers of the same input: x @ kernel[:, p] + bias[p] for every p, each like `dense`.

    One product with [C, P D] whose result is split, but on TPUs a product for each: where D is no multiple of 128, as 2240,
    parts of a [N, P D] array start within a tile and are copied, and so are their gradients. To read x again costs less
    (benchmarks/kernel_bytes.py).
    """
    if x.shape[-1] != kernel.shape[0]:
        raise ValueError(f"x has {x.shape[-1]} channels and the kernel takes {kernel.shape[0]}; they must agree.")
    parts = _parts(x.reshape(*x.shape[: min(1, x.ndim - 1)], -1, x.shape[-1]), kernel, bias)
    return tuple(part.reshape(*x.shape[:-1], -1) for part in parts)


@custom_vjp
def _parts(x, kernel, bias):
    return lax.platform_dependent(x, kernel, bias, tpu=_apart, default=_together)


def _apart(x, kernel, bias):
    return tuple(_affine(x, *layer) for layer in _layers(kernel, bias))


def _together(x, kernel, bias):
    return tuple(jnp.split(_affine(x, *_one_layer(kernel, bias)), kernel.shape[1], axis=-1))


def _layers(kernel, bias):
    return [(kernel[:, part], None if bias is None else bias[part]) for part in range(kernel.shape[1])]


def _one_layer(kernel, bias):
    return kernel.reshape(kernel.shape[0], -1), None if bias is None else bias.reshape(-1)


def _parts_forward(x, kernel, bias):
    return _parts(x, kernel, bias), (x, kernel, bias)


def _parts_backward(residuals, gradients):
    return lax.platform_dependent(*residuals, gradients, tpu=_apart_backward, default=_together_backward)


def _apart_backward(x, kernel, bias, gradients):
    layers = _layers(kernel, bias)
    dx, dw, db = zip(
        *(_affine_backward((x, *layer), g) for layer, g in zip(layers, gradients, strict=True)), strict=True
    )
    return sum(dx[1:], dx[0]), jnp.stack(dw, axis=1), None if bias is None else jnp.stack(db)


def _together_backward(x, kernel, bias, gradients):
    dx, dw, db = _affine_backward((x, *_one_layer(kernel, bias)), jnp.concatenate(gradients, axis=-1))
    return dx, dw.reshape(kernel.shape), None if bias is None else db.reshape(bias.shape)


_parts.defvjp(_parts_forward, _parts_backward)


@custom_vjp
def add_bias(y: Float[Array, "*B D"], bias: Float[Array, "D"]) -> Float[Array, "*B D"]:
    """y + bias in the dtype of y, with `sum_positions` as the derivative of the bias."""
    return y + bias.astype(y.dtype)


def _add_bias_forward(y, bias):
    return add_bias(y, bias), bias


def _add_bias_backward(bias, g):
    return g, sum_positions(g).astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def sum_positions(x: Float[Array, "*B D"]) -> Float[Array, "D"]:
    """Sum over all axes but the last, in float32.

    On CPU it is a product with ones: XLA makes a windowed reduction of a sum over several axes, at 50 times the cost.
    """

    def product(x):
        return jnp.matmul(jnp.ones((8, x.shape[0]), x.dtype), x, preferred_element_type=jnp.float32)[0]

    def reduction(x):
        return x.astype(jnp.float32).sum(0)

    return lax.platform_dependent(x.reshape(-1, x.shape[-1]), cpu=product, default=reduction)
