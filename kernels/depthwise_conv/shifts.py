"""Depthwise convolution as products with shifted grids, and its derivative."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

MAX_UNROLLED = 16  # grid positions whose products are summed in one fused expression


def shifted(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"], row_padding: int) -> Float[Array, "B h W C"]:
    """The sum over taps of the shifted grid times the tap's weights, in float32, between barriers.

    The barriers keep it a loop of its own: fused with the slice that takes a layer's kernel or residuals out of the stacked
    arrays of a scan, it is not vectorised on a CPU and takes 15 times as long.
    """
    x, kernel = lax.optimization_barrier((x, kernel))
    padded = _pad(x, kernel.shape[1], row_padding)
    height, width = padded.shape[1] - kernel.shape[0] + 1, x.shape[2]
    total = sum(
        padded[:, a : a + height, b : b + width].astype(jnp.float32) * kernel[a, b].astype(jnp.float32)
        for a in range(kernel.shape[0])
        for b in range(kernel.shape[1])
    )
    return lax.optimization_barrier(total.astype(x.dtype))


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
