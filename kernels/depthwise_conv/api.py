"""Depthwise convolution, stride 1, zero padding, odd kernel: the form that is fast on each backend.

Where a grid's rows are split over devices, a device takes its neighbours' rows into x and pads no rows itself.

XLA's grouped convolution is pathological on CPU (11 times slower than shifted multiply-adds at 32x32x11200), so that backend
gets the shifted form with its own derivative; every other backend gets the grouped convolution.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float
from sana_jax.kernels.dense.api import add_bias
from sana_jax.kernels.depthwise_conv import reference

MAX_UNROLLED = 16  # grid positions whose products are summed in one fused expression


def depthwise_conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw C"],
    bias: Float[Array, "C"] | None = None,
    *,
    row_padding: int | None = None,
) -> Float[Array, "B h W C"]:
    """Convolves every channel with its own odd-sized kernel; the output has the columns and dtype of x.

    Args:
      x: the grid.
      kernel: per channel.
      bias: per channel.
      row_padding: rows of zeros above and below x, so that h = H + 2 * row_padding - kh + 1. None: (kh - 1) / 2, which
        keeps the rows; 0: x brings the rows above and below along.

    Raises:
      ValueError: a kernel side is even, the channel counts differ, or x has too few rows.
    """
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(
            f"kernel is {kernel.shape[0]}x{kernel.shape[1]}; both sides must be odd to keep the grid's size."
        )
    if kernel.shape[-1] != x.shape[-1]:
        raise ValueError(f"kernel has {kernel.shape[-1]} channels and x has {x.shape[-1]}; they must agree.")
    row_padding = kernel.shape[0] // 2 if row_padding is None else row_padding
    if x.shape[1] + 2 * row_padding < kernel.shape[0]:
        raise ValueError(
            f"x has {x.shape[1]} rows, which with row_padding={row_padding} are fewer than the kernel's "
            f"{kernel.shape[0]}; give at least {kernel.shape[0] - 2 * row_padding}."
        )
    y = _convolve(x, kernel, row_padding)
    return y if bias is None else add_bias(y, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x, kernel, row_padding):
    cpu, default = (functools.partial(form, row_padding=row_padding) for form in (shifted, reference.depthwise_conv))
    return lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _forward(x, kernel, row_padding):
    return _convolve(x, kernel, row_padding), (x, kernel)


def _backward(row_padding, residuals, g):
    x, kernel = residuals

    def grouped(x, kernel, g):
        return jax.vjp(functools.partial(reference.depthwise_conv, row_padding=row_padding), x, kernel)[1](g)

    cpu = functools.partial(shifted_vjp, row_padding=row_padding)
    return lax.platform_dependent(x, kernel, g, cpu=cpu, default=grouped)


_convolve.defvjp(_forward, _backward)


def shifted(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"], row_padding: int) -> Float[Array, "B h W C"]:
    """`sum_of_shifts` between barriers.

    The barriers keep it a loop of its own: fused with the slice that takes a layer's kernel or residuals out of the stacked
    arrays of a scan, it is not vectorised on a CPU and takes 15 times as long.
    """
    return lax.optimization_barrier(sum_of_shifts(*lax.optimization_barrier((x, kernel)), row_padding))


def sum_of_shifts(
    x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"], row_padding: int
) -> Float[Array, "B h W C"]:
    """The sum over taps of the shifted grid times the tap's weights, in float32."""
    padded = _pad(x, kernel.shape[1], row_padding)
    height, width = padded.shape[1] - kernel.shape[0] + 1, x.shape[2]
    total = sum(
        padded[:, a : a + height, b : b + width].astype(jnp.float32) * kernel[a, b].astype(jnp.float32)
        for a in range(kernel.shape[0])
        for b in range(kernel.shape[1])
    )
    return total.astype(x.dtype)


def shifted_vjp(
    x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"], g: Float[Array, "B h W C"], row_padding: int
) -> tuple[Float[Array, "B H W C"], Float[Array, "kh kw C"]]:
    r"""$dx = g * w^{mirrored}$ and $dw_{ab} = \sum_{ij} x_{i+a-p,j+b-r}\,g_{ij}$, summed over the batch too.

    A reduction per tap would read x nine times through slow code, so products are added position by position into one
    [B, C] accumulator per tap, and the batch is summed once at the end.
    """
    x, g = lax.optimization_barrier((x, g))
    batch, height, width, channels = g.shape
    taps = [(a, b) for a in range(kernel.shape[0]) for b in range(kernel.shape[1])]
    columns = _largest_divisor(width, MAX_UNROLLED)
    rows = _largest_divisor(height, MAX_UNROLLED // columns)
    padded = _pad(x, kernel.shape[1], row_padding)
    halo = (rows + kernel.shape[0] - 1, columns + kernel.shape[1] - 1)

    def product(u, v):
        return u.astype(jnp.float32) * v.astype(jnp.float32)

    def add_block(sums, block):
        corner = (0, block // (width // columns) * rows, block % (width // columns) * columns, 0)
        inputs = lax.dynamic_slice(padded, corner, (batch, *halo, channels))
        outputs = lax.dynamic_slice(g, corner, (batch, rows, columns, channels))
        return [
            total + sum(product(inputs[:, i + a, j + b], outputs[:, i, j]) for i in range(rows) for j in range(columns))
            for total, (a, b) in zip(sums, taps, strict=True)
        ], None

    blocks = (height // rows) * (width // columns)
    zeros = [jnp.zeros((batch, channels), jnp.float32) for _ in taps]
    sums, _ = lax.scan(add_block, zeros, jnp.arange(blocks))
    dw = jnp.stack(sums).sum(1).reshape(kernel.shape).astype(kernel.dtype)
    return shifted(g, kernel[::-1, ::-1], kernel.shape[0] - 1 - row_padding), dw


def _pad(x, kernel_width, rows):
    columns = kernel_width // 2
    return jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))


def _largest_divisor(n: int, limit: int) -> int:
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)
