"""Depthwise convolution, stride 1, zero padding, odd kernel: the form that is fast on each backend.

XLA's grouped convolution is pathological on CPU (11 times slower than shifted multiply-adds at 32x32x11200), so that backend
gets the shifted form with its own derivative; every other backend gets the grouped convolution.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float
from sana_jax.kernels.dense.api import add_bias
from sana_jax.kernels.depthwise_conv import reference

MAX_UNROLLED = 16  # grid positions whose products are summed in one fused expression


def depthwise_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"], bias: Float[Array, "C"] | None = None
) -> Float[Array, "B H W C"]:
    """Convolves every channel with its own odd-sized kernel; the output has the size and dtype of x.

    Raises:
      ValueError: a kernel side is even, or the channel counts differ.
    """
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(
            f"kernel is {kernel.shape[0]}x{kernel.shape[1]}; both sides must be odd to keep the grid's size."
        )
    if kernel.shape[-1] != x.shape[-1]:
        raise ValueError(f"kernel has {kernel.shape[-1]} channels and x has {x.shape[-1]}; they must agree.")
    y = _convolve(x, kernel)
    return y if bias is None else add_bias(y, bias)


@jax.custom_vjp
def _convolve(x, kernel):
    return lax.platform_dependent(x, kernel, cpu=shifted, default=reference.depthwise_conv)


def _forward(x, kernel):
    return _convolve(x, kernel), (x, kernel)


def _backward(residuals, g):
    x, kernel = residuals

    def grouped(x, kernel, g):
        return jax.vjp(reference.depthwise_conv, x, kernel)[1](g)

    return lax.platform_dependent(x, kernel, g, cpu=shifted_vjp, default=grouped)


_convolve.defvjp(_forward, _backward)


def shifted(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"]) -> Float[Array, "B H W C"]:
    """The sum over taps of the shifted grid times the tap's weights, in float32.

    The barriers keep it a loop of its own: fused with the slice that takes a layer's kernel or residuals out of the stacked
    arrays of a scan, it is not vectorised and takes 15 times as long.
    """
    x, kernel = lax.optimization_barrier((x, kernel))
    height, width = x.shape[1:3]
    padded = _pad(x, kernel.shape)
    total = sum(
        padded[:, a : a + height, b : b + width].astype(jnp.float32) * kernel[a, b].astype(jnp.float32)
        for a in range(kernel.shape[0])
        for b in range(kernel.shape[1])
    )
    return lax.optimization_barrier(total.astype(x.dtype))


def shifted_vjp(
    x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"], g: Float[Array, "B H W C"]
) -> tuple[Float[Array, "B H W C"], Float[Array, "kh kw C"]]:
    r"""$dx = g * w^{mirrored}$ and $dw_{ab} = \sum_{ij} x_{i+a-r,j+b-r}\,g_{ij}$, summed over the batch too.

    A reduction per tap would read x nine times through slow code, so products are added position by position into one
    [B, C] accumulator per tap, and the batch is summed once at the end.
    """
    x, g = lax.optimization_barrier((x, g))
    batch, height, width, channels = x.shape
    taps = [(a, b) for a in range(kernel.shape[0]) for b in range(kernel.shape[1])]
    columns = _largest_divisor(width, MAX_UNROLLED)
    rows = _largest_divisor(height, MAX_UNROLLED // columns)
    padded = _pad(x, kernel.shape)
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
    return shifted(g, kernel[::-1, ::-1]), dw


def _pad(x, kernel_shape):
    rows, columns = kernel_shape[0] // 2, kernel_shape[1] // 2
    return jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))


def _largest_divisor(n: int, limit: int) -> int:
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)
