r"""A further scale of attention's tokens on TPUs (Mosaic): x is read once and the result is written once.

With $y_{ij} = \sum_{ab} w_{ab}\,x_{i+a-r,\,j+b-r}$ per channel, the result is $o_{ij} = G^T y_{ij}$ within each group of D
channels. Given $\dot o$, the gradients are

$$\dot y_{ij} = G\,\dot o_{ij}, \quad \dot x_{ij} = \sum_{ab} w_{ab}\,\dot y_{i+r-a,\,j+r-b}, \quad
  \dot w_{ab} = \sum_{ij} x_{i+a-r,\,j+b-r}\,\dot y_{ij}, \quad \dot G = \sum_{ij} y_{ij}\,\dot o_{ij}^T.$$

XLA writes y, moves its channels so that the groups are an axis of their own, multiplies, and moves them back. Here the forward
kernel keeps y in registers, and the backward kernel reads x and $\dot o$, computes y again and writes $\dot x$.

A kernel works on strips of rows (`tpu_strips`) of the groups that share 128 lanes (`tpu_groups`); matrices are kept as [D, C],
each in its group's lanes. Sums are float32; y is rounded to the dtype of x before it is multiplied, as it is in XLA's form.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float
from sana_jax.kernels.tpu_groups import COLUMNS_BY_COLUMNS, LANES, ROWS_BY_ROWS, fold, product, same_group, unfold
from sana_jax.kernels.tpu_strips import HALO, LARGEST_WIDTH, Strip, add_up, call_on_strips, taps


def refusal(
    grids: tuple[Float[Array, "B H W C"], ...],
    depth: Float[Array, "P kh kw C"],
    group: Float[Array, "P G D D"],
    *,
    row_padding: int,
) -> str | None:
    """Why these kernels cannot work on the arrays, or None where they can."""
    shape, dtypes = grids[0].shape, {x.dtype for x in grids}
    (height, width, channels), (side, columns), size = shape[1:], depth.shape[1:3], group.shape[-1]
    if not all(isinstance(n, int) for n in shape):
        return f"the shape {shape} is symbolic (jax.export), and a kernel's grid is made of numbers"
    if (side, columns) not in ((3, 3), (5, 5)) or not 0 <= row_padding <= side // 2:
        return (
            f"the convolution is {side}x{columns} with row_padding={row_padding}; it must be 3x3 (0, 1) or 5x5 (0 to 2)"
        )
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype("float32"), jnp.dtype("bfloat16")}:
        return f"the grids are {', '.join(sorted(map(str, dtypes)))}; all must be float32, or all bfloat16"
    if channels % LANES or LANES % size or size < 8:
        return (
            f"there are {channels} channels in groups of {size}, and whole groups of 8 or more must fill {LANES} lanes"
        )
    if height < max(2, side - 2 * row_padding) or width > LARGEST_WIDTH:
        return f"the grid is {height}x{width}; a strip is at least two rows of at most {LARGEST_WIDTH} positions"
    return None


def further_scale(
    grids: tuple[Float[Array, "B H W C"], ...],
    depth: Float[Array, "P k k C"],
    group: Float[Array, "P G D D"],
    row_padding: int,
) -> tuple[Float[Array, "B h W C"], ...]:
    """As `api.further_scale`, for arrays without a `refusal`."""
    spare = depth.shape[1] // 2 - row_padding  # rows that only feed the convolution
    each = zip(grids, depth, group, strict=True)
    return tuple(_same_grid(x, *weights)[:, spare : x.shape[1] - spare] for x, *weights in each)


@jax.custom_vjp
@jax.jit  # traced once for all layers, on every platform
def _same_grid(x, depth, group):
    return call_on_strips(
        _forward_kernel,
        grids=(x,),
        weights=_packed(depth, group),
        out_grids=(x,),
        strips_of=x,
        scratch=(HALO,),
        name="further_scale_forward",
        operations=2 * (depth.shape[0] ** 2 + LANES),
    )[0]


def _same_grid_forward(x, depth, group):
    return _same_grid(x, depth, group), (x, depth, group)


@jax.jit
def _same_grid_backward(residuals, g):
    x, depth, group = residuals
    dx, ddepth, dgroup = call_on_strips(
        _backward_kernel,
        grids=(x, g),
        weights=_packed(depth, group),
        out_grids=(x,),
        strips_of=x,
        scratch=(HALO, HALO),
        name="further_scale_backward",
        operations=2 * (3 * depth.shape[0] ** 2 + 2 * LANES),
        sums=True,
    )
    dgroup = dgroup.reshape(group.shape[1], *group.shape[::2]).swapaxes(0, 1)
    return dx, ddepth.reshape(depth.shape).astype(depth.dtype), dgroup.astype(group.dtype)


_same_grid.defvjp(_same_grid_forward, _same_grid_backward)


def _packed(depth, group):
    """The weights per channel: [k k, C] and [D, C]."""
    channels = depth.shape[-1]
    return depth.reshape(-1, channels), group.swapaxes(0, 1).reshape(-1, channels)


def _forward_kernel(strip: Strip, height, x, w, m, out, u):
    strip.fill(u, x, height)
    matrix = unfold(m, same_group(m.shape[0]))
    first = HALO - _reach(w)

    def row(i, _):
        out[i] = product(strip.convolve(u, first + i, w), matrix, out.dtype).astype(out.dtype)

    lax.fori_loop(0, strip.rows, row, None)


def _backward_kernel(strip: Strip, height, x, g, w, m, dx, dw, dm, u, e):
    r"""The scratch memory holds x and $\dot y$, e, with the rows around the strip."""
    dtype, reach, mask = dx.dtype, _reach(w), same_group(m.shape[0])
    matrix = unfold(m, mask)
    strip.fill(u, x, height)
    strip.fill(e, g, height, lambda do: product(do, matrix, dtype, ROWS_BY_ROWS))

    def row(i, sums):
        total, squares = sums
        dx[i] = strip.convolve_back(e, i + HALO + reach, w).astype(dx.dtype)
        own = strip.get(e, i + HALO)
        each = [(strip.get(u, i + HALO - reach + a, shift) * own).sum(0, keepdims=True) for a, shift, _ in taps(w)]
        y, do = strip.convolve(u, i + HALO - reach, w), g[1][i].astype(jnp.float32)
        do = jnp.where(strip.first + i < height, do, 0)
        squares += product(y, do, dtype, COLUMNS_BY_COLUMNS)
        return total + jnp.concatenate(each), squares

    zeros = jnp.zeros((w.shape[0], LANES), jnp.float32), jnp.zeros((LANES, LANES), jnp.float32)
    total, squares = lax.fori_loop(0, strip.rows, row, zeros)
    add_up([(dw, total), (dm, fold(squares, mask, m.shape[0]))])


def _reach(w_ref) -> int:
    return round(w_ref.shape[0] ** 0.5) // 2
