"""What TPU kernels share that convolve every channel of a grid with its own small kernel: strips of rows, 128 channels wide.

A kernel works on a strip of rows of 128 channels. It takes two rows above and two below along, brought by blocks of two rows of
their own. Grids are put into scratch memory between zero columns, so that the taps of a convolution are loads at as many places.
Rows outside the grid count as zeros; they are selected, not multiplied, because a block beyond the end holds whatever the
memory held.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float
from sana_jax.kernels.tpu_groups import LANES

# Positions of a strip. A kernel may hold ten grids of its size in float32, 1 MB each, and its neighbours' two rows.
BLOCK_POSITIONS = 2048
LARGEST_WIDTH = 512  # of which a strip holds four rows
VMEM_BYTES = 48 * 2**20

HALO = 2  # rows above and below a strip
_MARGIN = 8  # zero columns left and right: a register's rows, so that a grid begins at one


class Strip(NamedTuple):
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
        inner = HALO + self.rows
        for j in range(start, min(stop, HALO)):
            body(j, above[j].astype(jnp.float32))

        def of_strip(j, _):
            body(j, rows[j - HALO].astype(jnp.float32))

        lax.fori_loop(max(start, HALO), min(stop, inner), of_strip, None)
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

    def fill(self, scratch, refs: tuple, height: int, function: Callable = lambda x: x) -> None:
        """`function` of the strip and of its neighbours' rows, in the scratch memory."""
        self.between_margins(scratch)

        def put(j, x):
            row = self.first + j - HALO
            self.put(scratch, j, function(x), (row >= 0) & (row < height))

        self.each_row(refs, 0, self.rows + 2 * HALO, put)

    def convolve(self, scratch, row: int | Array, w_ref) -> Float[Array, "W 128"]:
        """A row of the result: the rows from `row` on, each as often as the kernel is wide."""
        return sum(self.get(scratch, row + a, shift) * w for a, shift, w in taps(w_ref))

    def convolve_back(self, scratch, row: int | Array, w_ref) -> Float[Array, "W 128"]:
        """A row of the gradient of what was convolved: the rows up to `row`, of the result's gradient."""
        return sum(self.get(scratch, row - a, -shift) * w for a, shift, w in taps(w_ref))


def taps(w_ref) -> list[tuple[int, int, Float[Array, "1 128"]]]:
    """Row, column from the middle, and weights of every tap of a square kernel, [side^2, 128]."""
    side = round(w_ref.shape[0] ** 0.5)
    places = [(a, b) for a in range(side) for b in range(side)]
    return [(a, b - side // 2, w_ref[pl.ds(side * a + b, 1), :].astype(jnp.float32)) for a, b in places]


def call_on_strips(
    kernel: Callable,
    *,
    grids: tuple[Float[Array, "B _ W C"], ...],
    weights: tuple[Float[Array, "_ C"], ...],
    out_grids: tuple[jax.ShapeDtypeStruct | Array, ...],
    strips_of: jax.ShapeDtypeStruct | Array,
    scratch: tuple[int, ...],
    name: str,
    operations: int,
    transcendentals: int = 0,
    sums: bool = False,
) -> Sequence[Array]:
    """Runs a kernel on every group of 128 channels and strip of rows.

    Args:
      kernel: takes a `Strip`, the height of the first grid, of each grid the refs (two rows above, strip, two rows below),
        the refs of the weights, of the results and of the scratch memory.
      grids: what it reads; those of fewer rows too.
      weights: per channel.
      out_grids: shapes of the results that are grids.
      strips_of: the grid whose rows are cut into strips.
      scratch: for each scratch grid, how many rows it has above and below the strip's.
      name: of the kernel, in profiles.
      operations, transcendentals: of a position and channel.
      sums: whether further results are sums over all positions, of the shapes of `weights`.
    """
    batch, _, width, channels = strips_of.shape
    rows = min(max(BLOCK_POSITIONS // width, 2) // 2 * 2, min(x.shape[1] for x in (*grids, *out_grids)) // 2 * 2)

    def strip_spec(height):
        last = pl.cdiv(height, rows) - 1
        return pl.BlockSpec((None, rows, width, LANES), lambda c, b, r: (b, jnp.minimum(r, last), 0, c))

    def halo_spec(height, offset):
        last = pl.cdiv(height, HALO) - 1
        place = lambda c, b, r: (b, jnp.clip((r * rows + offset) // HALO, 0, last), 0, c)
        return pl.BlockSpec((None, HALO, width, LANES), place)

    def three(x):
        height = x.shape[1]
        return halo_spec(height, -HALO), strip_spec(height), halo_spec(height, rows)

    per_channel = [pl.BlockSpec((w.shape[0], LANES), lambda c, b, r: (0, c)) for w in weights]
    summed = [jax.ShapeDtypeStruct(w.shape, jnp.float32) for w in weights] if sums else []
    columns = 2 * _MARGIN + pl.cdiv(width, 8) * 8
    count, height = len(grids), grids[0].shape[1]

    def on_strip(*refs):
        strip = Strip(first=pl.program_id(2) * rows, rows=rows, width=width)
        threes = [refs[3 * i : 3 * i + 3] for i in range(count)]
        kernel(strip, height, *threes, *refs[3 * count :])

    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out_grids] + summed
    positions = batch * height * width * channels
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
            flops=operations * positions,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*grids, *weights, *out_shape)),
            transcendentals=transcendentals * positions,
        ),
        name=name,
    )(*(x for x in grids for _ in range(3)), *weights)


def add_up(refs_and_totals: Sequence[tuple]) -> None:
    """Adds a strip's sums to what the strips before it left in the results; the first one begins at zero."""
    is_first = (pl.program_id(1) == 0) & (pl.program_id(2) == 0)
    for ref, total in refs_and_totals:
        ref[...] = jnp.where(is_first, 0, ref[...]) + total
