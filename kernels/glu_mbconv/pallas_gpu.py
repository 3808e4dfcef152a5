r"""The gated middle of the Mix-FFN on Hopper GPUs (Mosaic GPU), in bfloat16: value and gate are read once, the result is written once.

The formulas are those of `pallas_tpu`. Three kernels: the value; the gradients of both convolutions' results, of weights and
biases, for which the convolutions are made again; and with the former the gradients of value and gate.

A block of the grid takes 128 channels of either half and a tile of 8 x 8 positions, which the copy engine (TMA) brings with their
neighbours and stores. Each of its threads has one channel, so that no two need each other's numbers, and goes down the rows: what
it has read of one counts in the sums of the three rows around it, which stay in registers in float32, as the weights do. Beyond
the arrays' ends the copy engine reads zeros, whose SiLU is the zero that the convolution is padded with, and stores nothing.

They are not the default yet: nobody has timed them (`benchmarks/gpu_layers.py`).
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float
from sana_jax.kernels.choice import has_gpu

ROWS, COLUMNS, CHANNELS = 8, 8, 128  # of a tile; a warpgroup has as many threads as a tile has channels
CLAMPED = False  # whether a copy that would begin before an array begins with it, as in JAX's interpreter

_TAPS = tuple(itertools.product(range(3), range(3)))
_NUMBERS = len(_TAPS) + 1  # of a channel of either half: weights, and the bias last
_Each = Float[Array, "128"]  # a number of each thread
_Row = list[list[_Each]]  # of value and gate, the positions of a row


def refusal(
    value: Float[Array, "B H W C"], gate: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C2"], *, row_padding: int
) -> str | None:
    """Why the kernels cannot work on these arrays, or None where they can."""
    dtypes = sorted({str(x.dtype) for x in (value, gate)})
    if dtypes != ["bfloat16"]:
        return f"its arrays are {', '.join(dtypes)}; both must be bfloat16"
    if kernel.shape[:2] != (3, 3) or row_padding not in (0, 1):
        return f"the convolution is {kernel.shape[0]}x{kernel.shape[1]} with row_padding={row_padding}, not 3x3 with 0 or 1"
    if value.shape[-1] % 8:
        return f"{value.shape[-1]} channels are not a multiple of 8, the 16 bytes that the copy engine moves"
    if not all(isinstance(n, int) for n in value.shape):
        return f"the shape {value.shape} is symbolic (jax.export), and a kernel's grid is made of numbers"
    if value.shape[1] + 2 * row_padding < 3:
        return f"{value.shape[1]} rows with row_padding={row_padding} are fewer than the kernel's 3"
    if has_gpu() and (found := jax.devices()[0]).compute_capability != "9.0":
        return (
            f"the {found.device_kind} has compute capability {found.compute_capability}; it is written for Hopper, 9.0"
        )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
@functools.partial(jax.jit, static_argnums=4)  # traced once for all layers
def gated_depthwise(
    value: Float[Array, "B H W C"],
    gate: Float[Array, "B H W C"],
    kernel: Float[Array, "3 3 C2"],
    bias: Float[Array, "C2"],
    row_padding: int,
) -> Float[Array, "B h W C"]:
    """As `api.gated_depthwise`, for arrays without a `refusal`."""
    batch, height, width, channels = value.shape
    height += 2 * row_padding - 2
    x, start = _with_neighbours(_together(value, gate), row_padding)
    out = jax.ShapeDtypeStruct((batch, height, width, channels), value.dtype)
    run = _kernel(_forward_tile, out, start=start, row_tiles=pl.cdiv(height, ROWS), windows=2)
    return run(x, _grouped(kernel, bias))


def _forward(value, gate, kernel, bias, row_padding):
    return gated_depthwise(value, gate, kernel, bias, row_padding), (value, gate, kernel, bias)


@functools.partial(jax.jit, static_argnums=0)
def _backward(row_padding, residuals, g):
    """Gradients of value, gate, kernel and bias."""
    value, gate, kernel, bias = residuals
    (batch, height, width, channels), weights = value.shape, _grouped(kernel, bias)
    groups, column_tiles = weights.shape[0], pl.cdiv(width, COLUMNS)
    together = _together(value, gate)

    x, start = _with_neighbours(together, row_padding)
    out = (
        jax.ShapeDtypeStruct((*g.shape[:3], 2, channels), value.dtype),
        jax.ShapeDtypeStruct((batch, column_tiles, groups, 2, _NUMBERS, CHANNELS), jnp.float32),
    )
    sums = plgpu.SMEM((2, _NUMBERS, CHANNELS), jnp.float32)
    dy, partial = _kernel(_convolved_vjp_tiles, out, start=start, windows=2, tiles=1, scratch=(sums,))(x, g, weights)
    d = partial.sum((0, 1)).transpose(2, 1, 0, 3).reshape(_NUMBERS, 2, -1)[..., :channels].reshape(_NUMBERS, -1)

    dy, start = _with_neighbours(dy, 2 - row_padding)
    out = jax.ShapeDtypeStruct(together.shape, value.dtype)
    row_tiles = pl.cdiv(height, ROWS)
    dx = _kernel(_inputs_vjp_tile, out, start=start, row_tiles=row_tiles, windows=2, tiles=2)(dy, together, weights)
    dx = jnp.split(dx.reshape(batch, height * width, 2 * channels), 2, axis=-1)  # flat as in `_together`
    dx = [part.reshape(value.shape) for part in dx]
    return *dx, d[:-1].reshape(kernel.shape).astype(kernel.dtype), d[-1].astype(bias.dtype)


gated_depthwise.defvjp(_forward, _backward)


def _together(value: Float[Array, "B H W C"], gate: Float[Array, "B H W C"]) -> Float[Array, "B H W 2 C"]:
    """As one array, flat in between: XLA sees that it is the product that they were taken from, and copies nothing."""
    batch, height, width, channels = value.shape
    both = jnp.concatenate([x.reshape(batch, height * width, channels) for x in (value, gate)], axis=-1)
    return both.reshape(batch, height, width, 2, channels)


def _with_neighbours(x: Float[Array, "B H W 2 C"], rows: int) -> tuple[Float[Array, "B _ _ 2 C"], tuple[int, int]]:
    """The array, and where in it the first tile's window begins: `rows` above the tile, one column left of it."""
    if CLAMPED:
        return jnp.pad(x, ((0, 0), (rows, 0), (1, 0), (0, 0), (0, 0))), (0, 0)
    return x, (-rows, -1)


def _grouped(kernel: Float[Array, "3 3 C2"], bias: Float[Array, "C2"]) -> Float[Array, "G 2 10 128"]:
    """The weights and after them the bias, block by block."""
    channels = kernel.shape[-1] // 2
    weights = jnp.concatenate([kernel.reshape(-1, 2 * channels).astype(jnp.float32), bias[None].astype(jnp.float32)])
    weights = jnp.pad(weights.reshape(_NUMBERS, 2, channels), ((0, 0), (0, 0), (0, -channels % CHANNELS)))
    return weights.reshape(_NUMBERS, 2, -1, CHANNELS).transpose(2, 1, 0, 3)


def _kernel(
    block: Callable,
    out_type: jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...],
    *,
    start: tuple[int, int],
    windows: int,
    tiles: int = 0,
    row_tiles: int = 1,
    scratch: Sequence = (),
) -> Callable:
    """A kernel whose blocks hold `windows` tiles with their neighbours, the first of which begins at `start`, and `tiles` without."""
    grids = out_type[0] if isinstance(out_type, tuple) else out_type
    return plgpu.kernel(
        functools.partial(block, start=start),
        out_type=out_type,
        scratch_types=(
            *[plgpu.SMEM((ROWS + 2, COLUMNS + 2, CHANNELS), jnp.bfloat16)] * windows,
            *[plgpu.SMEM((ROWS, COLUMNS, CHANNELS), jnp.bfloat16)] * tiles,
            plgpu.SMEM((2, _NUMBERS, CHANNELS), jnp.float32),
            *scratch,
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=windows + tiles),
        ),
        grid=(pl.cdiv(grids.shape[-1], CHANNELS), pl.cdiv(grids.shape[2], COLUMNS), row_tiles, grids.shape[0]),
        grid_names=("group", "column", "row", "picture"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # Threads meet only at the copies. Each has one channel; to infer that plain layout would take minutes.
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )


def _forward_tile(x, weights, y, value, gate, own_weights, weights_barrier, barrier, *, start):
    row_tile = lax.axis_index("row")
    _load(x, (value, gate), barrier, row_tile, start)
    w, b = _load_weights(weights, own_weights, weights_barrier)
    plgpu.barrier_wait(barrier)

    rows = (_activated(_row((value, gate), i)) for i in range(ROWS + 2))
    for r, (a, g) in enumerate(_convolve(rows, w, b)):
        for j, sigmoid in enumerate(_sigmoids(g)):
            value[r, j] = (a[j] * g[j] * sigmoid).astype(value.dtype)  # this row has been read
    _store((value,), y, row_tile)
    plgpu.wait_smem_to_gmem(0)


def _convolved_vjp_tiles(
    x, dresult, weights, dy, partial, value, gate, given, own_weights, sums, weights_barrier, barrier, *, start
):
    """Gradients of the convolved halves, tile by tile down the rows, and what these add to those of weights and biases."""
    w, b = _load_weights(weights, own_weights, weights_barrier)

    def on_tile(row_tile, totals):
        _load(x, (value, gate), barrier, row_tile, start)
        _load(dresult, (given,), barrier, row_tile)
        plgpu.barrier_wait(barrier)
        rows = []

        def read():
            for i in range(ROWS + 2):
                rows.append(_activated(_row((value, gate), i)))
                yield rows[-1]

        totals = [list(half) for half in totals]
        for r, (a, g) in enumerate(_convolve(read(), w, b)):
            for j, sigmoid in enumerate(_sigmoids(g)):
                d = given[r, j].astype(jnp.float32) * sigmoid
                for half, each in enumerate((d * g[j], d * a[j] * (1 + g[j] * (1 - sigmoid)))):
                    (value, gate)[half][r, j] = each.astype(value.dtype)  # this row has been read
                    for s, t in _TAPS:
                        totals[half][3 * s + t] += rows[r + s][half][j + t] * each
                    totals[half][-1] += each
        _store((value, gate), dy, row_tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return totals

    zero = plgpu.layout_cast(jnp.zeros(CHANNELS, jnp.float32), plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=1))
    totals = lax.fori_loop(0, pl.cdiv(dresult.shape[1], ROWS), on_tile, [[zero] * _NUMBERS] * 2)
    for half, k in itertools.product(range(2), range(_NUMBERS)):
        sums[half, k] = totals[half][k]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(sums, partial.at[tuple(map(lax.axis_index, ("picture", "column", "group")))])
    plgpu.wait_smem_to_gmem(0)


def _inputs_vjp_tile(
    dy, x, weights, dx, around_value, around_gate, value, gate, own_weights, weights_barrier, barrier, *, start
):
    """Gradients of value and gate out of those of the convolved halves."""
    row_tile = lax.axis_index("row")
    _load(dy, (around_value, around_gate), barrier, row_tile, start)
    _load(x, (value, gate), barrier, row_tile)
    w, _ = _load_weights(weights, own_weights, weights_barrier)
    plgpu.barrier_wait(barrier)

    rows = (_row((around_value, around_gate), i) for i in range(ROWS + 2))
    for r, du in enumerate(_convolve(rows, [half[::-1] for half in w])):
        row = _row((value, gate), r)
        for half, tile in enumerate((value, gate)):
            for j, sigmoid in enumerate(_sigmoids(row[half])):
                slope = sigmoid * (1 + row[half][j] * (1 - sigmoid))
                tile[r, j] = (du[half][j] * slope).astype(tile.dtype)
    _store((value, gate), dx, row_tile)
    plgpu.wait_smem_to_gmem(0)


def _convolve(
    rows: Iterator[_Row], weights: Sequence[Sequence[_Each]], biases: Sequence[_Each] | None = None
) -> Iterator[_Row]:
    """The rows of a tile, convolved, each as soon as the row below it is read; `rows` has one more at each of the four sides."""
    sums = {}
    for i, row in enumerate(rows):
        for half, (s, t), j in itertools.product(range(2), _TAPS, range(COLUMNS)):
            r = i - s
            if 0 <= r < ROWS:
                term = row[half][j + t] * weights[half][3 * s + t]
                before = sums.get((r, half, j), biases[half] if biases else None)
                sums[r, half, j] = term if before is None else before + term
        if i >= 2:
            yield [[sums.pop((i - 2, half, j)) for j in range(COLUMNS)] for half in range(2)]


def _row(halves, i: int) -> _Row:
    return [[half[i, j].astype(jnp.float32) for j in range(half.shape[1])] for half in halves]


def _activated(row: _Row) -> _Row:
    return [[x * sigmoid for x, sigmoid in zip(half, _sigmoids(half), strict=True)] for half in row]


def _sigmoids(xs: Sequence[_Each]) -> list[_Each]:
    """Of an even number. Two share a reciprocal: the unit for it, which also makes the exponentials, has the most to do."""
    found = []
    for pair in zip(xs[::2], xs[1::2], strict=True):
        a, b = (1 + jnp.exp(jnp.minimum(-x, 40.0)) for x in pair)  # whose product is finite
        root = lax.rsqrt(jnp.maximum(a * b, 1.0))  # which it is anyway: the compiler leaves out what denormals need
        found += [b * (root * root), a * (root * root)]
    return found


def _load_weights(weights, own, barrier) -> tuple[list[list[_Each]], list[_Each]]:
    """Taps and bias of either half."""
    plgpu.copy_gmem_to_smem(weights.at[lax.axis_index("group")], own, barrier)
    plgpu.barrier_wait(barrier)
    numbers = [[own[half, k] for k in range(_NUMBERS)] for half in range(2)]
    return [half[:-1] for half in numbers], [half[-1] for half in numbers]


def _load(source, tiles, barrier, row_tile, start=(0, 0)) -> None:
    """Begins to copy a tile of either half, or of an array that has one."""
    for half, tile in enumerate(tiles):
        part = _part(source, row_tile * ROWS + start[0], tile.shape[0], start[1], tile.shape[1], half)
        plgpu.copy_gmem_to_smem(part, tile, barrier)


def _store(tiles, target, row_tile) -> None:
    """Begins to copy tiles of results, which may lie at the start of larger tiles, row by row."""
    plgpu.commit_smem()
    for (half, tile), r in itertools.product(enumerate(tiles), range(ROWS)):
        row = tile.at[pl.ds(r, 1), pl.ds(0, COLUMNS)]
        plgpu.copy_smem_to_gmem(row, _part(target, row_tile * ROWS + r, 1, 0, COLUMNS, half))


def _part(array, first_row, rows: int, column_offset: int, columns: int, half: int):
    """A part of a picture's rows and columns and of the channels of this block, of one half where the array has two."""
    group, column, picture = (lax.axis_index(name) for name in ("group", "column", "picture"))
    places = picture, pl.ds(first_row, rows), pl.ds(column * COLUMNS + column_offset, columns)
    return array.at[(*places, *[half] * (array.ndim == 5), pl.ds(group * CHANNELS, CHANNELS))]
