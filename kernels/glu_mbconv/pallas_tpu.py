r"""The gated middle of the Mix-FFN on TPUs (Mosaic): value and gate are read once, the result is written once.

With $x$ for either half and $u = \mathrm{SiLU}(x)$, $y_{ij} = b + \sum_{ab} w_{ab}\,u_{i+a-1,\,j+b-1}$ and the result is
$o = y^v\,\mathrm{SiLU}(y^g)$. Given $\dot o$, the gradients are

$$\dot y^v = \dot o\,\mathrm{SiLU}(y^g), \quad \dot y^g = \dot o\,y^v\,\mathrm{SiLU}'(y^g), \quad
  \dot x_{ij} = \mathrm{SiLU}'(x_{ij}) \sum_{ab} w_{ab}\,\dot y_{i+1-a,\,j+1-b}, \quad
  \dot w_{ab} = \sum_{ij} u_{i+a-1,\,j+b-1}\,\dot y_{ij}, \quad \dot b = \sum_{ij} \dot y_{ij}.$$

XLA makes several passes over these grids, the widest activations of the model, and keeps y between the passes. Here the
forward kernel reads x and writes o, and the backward kernel reads x and $\dot o$, computes y again and writes $\dot x$: nothing
else of this width touches the memory. All arithmetic is float32.

A kernel works on a strip of rows of 128 channels. It takes two rows above and two below along, brought by blocks of two rows of
their own: y next to the strip, which $\dot x$ needs, needs u two rows away. SiLU of the strip is put into scratch memory between
zero columns, so that the nine taps are loads at nine places. Rows outside the grid count as zeros; they are selected, not multiplied,
because a block beyond the end holds whatever the memory held. Channels never mix, so that lanes beyond the last one do no harm.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

LANES = 128
# Positions of a strip. The backward kernel holds ten grids of its size, 1 MB each, and its neighbours' two rows.
BLOCK_POSITIONS = 2048
LARGEST_WIDTH = 512  # of which a strip holds four rows
VMEM_BYTES = 48 * 2**20

_HALO = 2  # rows above and below a strip
_MARGIN = 8  # zero columns left and right: a register's rows, so that a grid begins at one
_TAPS = [(a, b) for a in range(3) for b in range(3)]


def refusal(
    value: Float[Array, "B H W C"], gate: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C2"], *, row_padding: int
) -> str | None:
    """Why these kernels cannot work on the arrays, or None where they can."""
    batch, height, width, channels = value.shape
    if not all(isinstance(n, int) for n in value.shape):
        return f"the shape {value.shape} is symbolic (jax.export), and a kernel's grid is made of numbers"
    if kernel.shape[:2] != (3, 3) or row_padding not in (0, 1):
        return f"the convolution is {kernel.shape[0]}x{kernel.shape[1]} with row_padding={row_padding}, not 3x3 with 0 or 1"
    if value.dtype != gate.dtype or value.dtype not in (jnp.float32, jnp.bfloat16):
        return f"value is {value.dtype} and gate {gate.dtype}; both must be float32, or both bfloat16"
    if channels < LANES:
        return f"{channels} channels are fewer than {LANES} lanes"
    if height - 2 * (1 - row_padding) < 2 or width > LARGEST_WIDTH:
        return f"the grid is {height}x{width}; a strip is at least two rows of at most {LARGEST_WIDTH} positions"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def gated_depthwise(
    value: Float[Array, "B H W C"],
    gate: Float[Array, "B H W C"],
    kernel: Float[Array, "3 3 C2"],
    bias: Float[Array, "C2"],
    row_padding: int,
) -> Float[Array, "B h W C"]:
    """As `api.gated_depthwise`, for arrays without a `refusal`."""
    batch, height, width, channels = value.shape
    rows = height - 2 * (1 - row_padding)
    out = jax.ShapeDtypeStruct((batch, rows, width, channels), value.dtype)
    return _call(
        functools.partial(_forward_kernel, row_padding=row_padding),
        grids=(value, gate),
        weights=(*_split(kernel.reshape(9, -1)), *_split(bias.reshape(1, -1))),
        out_grids=(out,),
        strips_of=out,
        scratch=(_HALO, _HALO),
        operations=2 * 20,
    )[0]


def _gated_depthwise_forward(value, gate, kernel, bias, row_padding):
    return gated_depthwise(value, gate, kernel, bias, row_padding), (value, gate, kernel, bias)


def _gated_depthwise_backward(row_padding, residuals, g):
    value, gate, kernel, bias = residuals
    dvalue, dgate, *dweights = _call(
        functools.partial(_backward_kernel, row_padding=row_padding),
        grids=(value, gate, g),
        weights=(*_split(kernel.reshape(9, -1)), *_split(bias.reshape(1, -1))),
        out_grids=(value, gate),
        strips_of=value,
        scratch=(_HALO, _HALO, 1, 1),
        operations=2 * 60,
        sums=True,
    )
    dkernel, dbias = (jnp.concatenate(pair, axis=-1) for pair in (dweights[:2], dweights[2:]))
    return dvalue, dgate, dkernel.reshape(kernel.shape).astype(kernel.dtype), dbias[0].astype(bias.dtype)


gated_depthwise.defvjp(_gated_depthwise_forward, _gated_depthwise_backward)


def _split(array):
    return jnp.split(array, 2, axis=-1)


class _Strip(NamedTuple):
    """Rows of a grid that a kernel works on.

    Attributes:
      first: number of its first row.
      rows, width: how many rows it has and how many positions they have.
    """

    first: Array
    rows: int
    width: int

    def each_row(self, refs: tuple, start: int, stop: int, body: Callable) -> None:
        """body(j, row [W, 128] in float32) for j in start..stop; row 0 lies two above the strip."""
        above, rows, below = refs
        inner = _HALO + self.rows
        for j in range(start, min(stop, _HALO)):
            body(j, above[j].astype(jnp.float32))

        def of_strip(j, _):
            body(j, rows[j - _HALO].astype(jnp.float32))

        lax.fori_loop(max(start, _HALO), min(stop, inner), of_strip, None)
        for j in range(max(start, inner), stop):
            body(j, below[j - inner].astype(jnp.float32))

    def between_margins(self, scratch) -> None:
        """Empties the columns around the grid that is put into the scratch memory."""
        begin = _MARGIN + self.width // 8 * 8
        for columns in (pl.ds(0, _MARGIN), pl.ds(begin, scratch.shape[1] - begin)):
            scratch[:, columns, :] = jnp.zeros((scratch.shape[0], columns.size, LANES), jnp.float32)

    def put(self, scratch, row: int | Array, values: Float[Array, "W 128"], real: Bool[Array, ""]) -> None:
        """A row of the scratch memory: values, or zeros where there is no such row in the grid."""
        scratch[row, pl.ds(_MARGIN, self.width), :] = jnp.where(real, values, 0)

    def get(self, scratch, row: int | Array, shift: int = 0) -> Float[Array, "W 128"]:
        """A row, moved so that column j holds that of j + shift."""
        return scratch[row, pl.ds(_MARGIN + shift, self.width), :]

    def activate(self, scratch, refs: tuple, height: int) -> None:
        """SiLU of the strip and of its neighbours' rows."""
        self.between_margins(scratch)

        def put(j, x):
            row = self.first + j - _HALO
            self.put(scratch, j, x * jax.nn.sigmoid(x), (row >= 0) & (row < height))

        self.each_row(refs, 0, self.rows + 2 * _HALO, put)

    def convolve(self, scratch, row: int | Array, w_ref, b_ref) -> Float[Array, "W 128"]:
        """The rows `row` to `row` + 2, by their taps."""
        products = (self.get(scratch, row + a, b - 1) * _tap(w_ref, a, b) for a, b in _TAPS)
        return sum(products, b_ref[...].astype(jnp.float32))


def _tap(w_ref, a: int, b: int) -> Float[Array, "1 128"]:
    return w_ref[pl.ds(3 * a + b, 1), :].astype(jnp.float32)


def _forward_kernel(strip, height, value, gate, wv, wg, bv, bg, out, uv, ug, *, row_padding):
    strip.activate(uv, value, height)
    strip.activate(ug, gate, height)

    def row(i, _):
        first = i + _HALO - row_padding  # of the three rows that the convolution reads
        y, g = strip.convolve(uv, first, wv, bv), strip.convolve(ug, first, wg, bg)
        out[i] = (y * g * jax.nn.sigmoid(g)).astype(out.dtype)

    lax.fori_loop(0, strip.rows, row, None)


def _backward_kernel(
    strip, height, value, gate, g, wv, wg, bv, bg, dv, dg, dwv, dwg, dbv, dbg, uv, ug, ev, eg, *, row_padding
):
    """The scratch memory holds u of both halves, and the gradients of y, e, of the strip and a row above and below."""
    strip.activate(uv, value, height)
    strip.activate(ug, gate, height)
    strip.between_margins(ev)
    strip.between_margins(eg)

    def gradient_of_y(j, do):
        k = j - row_padding  # e's row; that of the result lies row_padding further down
        row = strip.first + k - 1
        real = (row >= 1 - row_padding) & (row < height - (1 - row_padding))
        y, z = strip.convolve(uv, k, wv, bv), strip.convolve(ug, k, wg, bg)
        s = jax.nn.sigmoid(z)
        strip.put(ev, k, do * z * s, real)
        strip.put(eg, k, do * y * s * (1 + z * (1 - s)), real)

    strip.each_row(g, row_padding, row_padding + strip.rows + 2, gradient_of_y)

    def row(i, sums):
        added = []
        for x_refs, u, e, w, dx in ((value, uv, ev, wv, dv), (gate, ug, eg, wg, dg)):
            x = x_refs[1][i].astype(jnp.float32)
            s = jax.nn.sigmoid(x)
            du = sum(strip.get(e, i + 2 - a, 1 - b) * _tap(w, a, b) for a, b in _TAPS)
            dx[i] = (du * s * (1 + x * (1 - s))).astype(dx.dtype)
            own = strip.get(e, i + 1)
            added += [strip.get(u, i + 1 + a, b - 1) * own for a, b in _TAPS] + [own]
        return [total + x.sum(0, keepdims=True) for total, x in zip(sums, added, strict=True)]

    sums = lax.fori_loop(0, strip.rows, row, [jnp.zeros((1, LANES), jnp.float32)] * 20)
    is_first = (pl.program_id(1) == 0) & (pl.program_id(2) == 0)
    for ref, totals in ((dwv, sums[:9]), (dbv, sums[9:10]), (dwg, sums[10:19]), (dbg, sums[19:])):
        ref[...] = jnp.where(is_first, 0, ref[...]) + jnp.concatenate(totals, axis=0)


def _call(
    kernel: Callable,
    *,
    grids: tuple[Float[Array, "B _ W C"], ...],
    weights: tuple[Float[Array, "_ C"], ...],
    out_grids: tuple[jax.ShapeDtypeStruct | Array, ...],
    strips_of: jax.ShapeDtypeStruct | Array,
    scratch: tuple[int, ...],
    operations: int,
    sums: bool = False,
) -> Sequence[Array]:
    """Runs a kernel on every group of channels and strip of rows.

    Args:
      kernel: takes a `_Strip`, the height of the first grid, of each grid the refs (two rows above, strip, two rows below),
        the refs of the weights, of the results and of the scratch memory.
      grids: what it reads; those of fewer rows too.
      weights: per channel.
      out_grids: shapes of the results that are grids.
      strips_of: the grid whose rows are cut into strips.
      scratch: for each scratch grid, how many rows it has above and below the strip's.
      operations: of a position and channel.
      sums: whether further results are sums over all positions, of the shapes of `weights`.
    """
    batch, _, width, channels = strips_of.shape
    rows = min(max(BLOCK_POSITIONS // width, 2) // 2 * 2, min(x.shape[1] for x in (*grids, *out_grids)) // 2 * 2)

    def strip_spec(height):
        last = pl.cdiv(height, rows) - 1
        return pl.BlockSpec((None, rows, width, LANES), lambda c, b, r: (b, jnp.minimum(r, last), 0, c))

    def halo_spec(height, offset):
        last = pl.cdiv(height, _HALO) - 1
        place = lambda c, b, r: (b, jnp.clip((r * rows + offset) // _HALO, 0, last), 0, c)
        return pl.BlockSpec((None, _HALO, width, LANES), place)

    def three(x):
        height = x.shape[1]
        return halo_spec(height, -_HALO), strip_spec(height), halo_spec(height, rows)

    per_channel = [pl.BlockSpec((w.shape[0], LANES), lambda c, b, r: (0, c)) for w in weights]
    summed = [jax.ShapeDtypeStruct(w.shape, jnp.float32) for w in weights] if sums else []
    columns = 2 * _MARGIN + pl.cdiv(width, 8) * 8
    count, height = len(grids), grids[0].shape[1]

    def on_strip(*refs):
        strip = _Strip(first=pl.program_id(2) * rows, rows=rows, width=width)
        threes = [refs[3 * i : 3 * i + 3] for i in range(count)]
        kernel(strip, height, *threes, *refs[3 * count :])

    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out_grids] + summed
    return pl.pallas_call(
        on_strip,
        grid=(pl.cdiv(channels, LANES), batch, pl.cdiv(strips_of.shape[1], rows)),
        in_specs=[spec for x in grids for spec in three(x)] + per_channel,
        out_specs=[strip_spec(x.shape[1]) for x in out_grids] + per_channel * sums,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((rows + 2 * more, columns, LANES), jnp.float32) for more in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", *("arbitrary" if sums else "parallel",) * 2), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=operations * batch * height * width * channels,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*grids, *weights, *out_shape)),
            transcendentals=len(grids) * batch * height * width * channels,
        ),
        name=f"gated_depthwise{kernel.func.__name__.removesuffix('_kernel')}",
    )(*(x for x in grids for _ in range(3)), *weights)
