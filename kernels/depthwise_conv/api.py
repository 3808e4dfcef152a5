"""Depthwise convolution, stride 1, zero padding, odd kernel: the form that is fast on each backend.

Where a grid's rows are split over devices, a device takes its neighbours' rows into x and pads no rows itself.

XLA's grouped convolution is pathological on CPU (11 times slower than shifted multiply-adds at 32x32x11200), so that backend
gets the shifted form with its own derivative; every other backend gets the grouped convolution. On GPUs that is a call of cuDNN.
Shifted products, summed in float32, for XLA to fuse with what comes before and after took 1.3 to 2.3 times as long on an H200.
"""

import functools

import jax
from jax import lax
from jaxtyping import Array, Float
from sana_jax.kernels.dense.api import add_bias
from sana_jax.kernels.depthwise_conv import reference, shifts
from sana_jax.kernels.derivatives import custom_vjp


def _grouped_vjp(x, kernel, g, row_padding):
    return jax.vjp(functools.partial(reference.depthwise_conv, row_padding=row_padding), x, kernel)[1](g)


# The convolution and its derivative.
_FORMS = {
    "grouped": (reference.depthwise_conv, _grouped_vjp),
    "shifted": (shifts.shifted, shifts.shifted_vjp),
}


def depthwise_conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw C"],
    bias: Float[Array, "C"] | None = None,
    *,
    row_padding: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B h W C"]:
    """Convolves every channel with its own odd-sized kernel; the output has the columns and dtype of x.

    Args:
      x: the grid.
      kernel: per channel.
      bias: per channel.
      row_padding: rows of zeros above and below x, so that h = H + 2 * row_padding - kh + 1. None: (kh - 1) / 2, which
        keeps the rows; 0: x brings the rows above and below along.
      implementation: "grouped", XLA's convolution; "shifted", products with shifted grids as loops of their own. None:
        "shifted" on CPUs, "grouped" elsewhere.

    Raises:
      ValueError: a kernel side is even, the channel counts differ, `row_padding` is negative, too little for
        the rows of x or not below those of the kernel, or the implementation is unknown.
    """
    if implementation not in (None, *_FORMS):
        raise ValueError(f"implementation={implementation!r} is unknown; use None, {', '.join(_FORMS)}.")
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(
            f"kernel is {kernel.shape[0]}x{kernel.shape[1]}; both sides must be odd to keep the grid's size."
        )
    if kernel.shape[-1] != x.shape[-1]:
        raise ValueError(f"kernel has {kernel.shape[-1]} channels and x has {x.shape[-1]}; they must agree.")
    row_padding = kernel.shape[0] // 2 if row_padding is None else row_padding
    if not 0 <= row_padding < kernel.shape[0]:
        raise ValueError(
            f"row_padding={row_padding} counts rows of zeros above and below x; use 0 to {kernel.shape[0] - 1}, below the "
            "kernel's rows."
        )
    if x.shape[1] + 2 * row_padding < kernel.shape[0]:
        raise ValueError(
            f"x has {x.shape[1]} rows, which with row_padding={row_padding} are fewer than the kernel's "
            f"{kernel.shape[0]}; give at least {kernel.shape[0] - 2 * row_padding}."
        )
    y = _convolve(x, kernel, row_padding, implementation)
    return y if bias is None else add_bias(y, bias)


@functools.partial(custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, kernel, row_padding, implementation):
    return _run(0, implementation, row_padding, x, kernel)


def _forward(x, kernel, row_padding, implementation):
    return _convolve(x, kernel, row_padding, implementation), (x, kernel)


def _backward(row_padding, implementation, residuals, g):
    return _run(1, implementation, row_padding, *residuals, g)


_convolve.defvjp(_forward, _backward)


def _run(part, implementation, row_padding, *arrays):
    """A form's convolution (part 0) or derivative (1)."""
    forms = {name: functools.partial(form[part], row_padding=row_padding) for name, form in _FORMS.items()}
    if implementation is not None:
        return forms[implementation](*arrays)
    return lax.platform_dependent(*arrays, cpu=forms["shifted"], default=forms["grouped"])
