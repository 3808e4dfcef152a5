r"""The gated middle of the Mix-FFN on Hopper GPUs (Mosaic GPU), in bfloat16, where no derivative is taken; that is XLA's.

XLA applies the first SiLU and pads the grid; the kernel reads that once, but for its tiles' borders, and writes the gated result:

$$y = a\,\mathrm{SiLU}(g), \quad [a \mid g]_{ij} = b + \sum_{st} x_{i+s,\,j+t}\,w_{st}.$$

A block of the grid takes 128 channels of either half and a tile of 8 x 8 positions, which the copy engine (TMA) brings with their
neighbours. It goes down the rows: a row that is read counts in the sums of the three rows around it, which stay in registers, as
the weights do. A thread's 8 channels are the same in every row; weights are repeated for the 8 columns of a tile, so that
each thread finds its own. Beyond the arrays' ends the copy engine reads zeros and stores nothing.

Not the default yet: on an H200 it gave the formula's values (tests/gpu), and nobody has timed it (`benchmarks/gpu_layers.py`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float
from sana_jax.kernels.choice import has_gpu
from sana_jax.kernels.glu_mbconv.xla import backward, forward, silu

ROWS, COLUMNS, CHANNELS = 8, 8, 128  # of a tile
REACH = 1  # of a 3x3 kernel


def refusal(
    value: Float[Array, "B H W C"], gate: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C2"], *, row_padding: int
) -> str | None:
    """Why the kernel cannot work on these arrays, or None where it can."""
    dtypes = sorted({str(x.dtype) for x in (value, gate)})
    if dtypes != ["bfloat16"]:
        return f"its arrays are {', '.join(dtypes)}; both must be bfloat16"
    if kernel.shape[:2] != (3, 3):
        return f"the convolution is {kernel.shape[0]}x{kernel.shape[1]}; it does 3x3"
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
def gated_depthwise(
    value: Float[Array, "B H W C"],
    gate: Float[Array, "B H W C"],
    kernel: Float[Array, "3 3 C2"],
    bias: Float[Array, "C2"],
    row_padding: int,
) -> Float[Array, "B h W C"]:
    """As `api.gated_depthwise`."""
    batch, height, width, channels = value.shape
    # Flattened, so that XLA sees the product that value and gate are the halves of.
    both = jnp.concatenate([x.reshape(batch, height * width, channels) for x in (value, gate)], axis=-1)
    rows, columns = (row_padding, row_padding), (REACH, REACH)
    x = jnp.pad(silu(both).reshape(batch, height, width, 2 * channels), ((0, 0), rows, columns, (0, 0)))
    height += 2 * row_padding - 2 * REACH

    groups = pl.cdiv(channels, CHANNELS)
    weights = jnp.concatenate([kernel.reshape(9, -1), bias[None].astype(kernel.dtype)]).astype(jnp.bfloat16)
    weights = jnp.pad(weights.reshape(10, 2, channels), ((0, 0), (0, 0), (0, groups * CHANNELS - channels)))
    weights = weights.reshape(10, 2, groups, 1, CHANNELS).transpose(2, 1, 0, 3, 4)
    weights = jnp.broadcast_to(weights, (groups, 2, 10, COLUMNS, CHANNELS))

    run = plgpu.kernel(
        functools.partial(_tile, channels=channels),
        out_type=jax.ShapeDtypeStruct((batch, height, width, channels), value.dtype),
        scratch_types=(
            *[plgpu.SMEM((ROWS + 2 * REACH, COLUMNS + 2 * REACH, CHANNELS), jnp.bfloat16)] * 2,
            plgpu.SMEM((2, 10, COLUMNS, CHANNELS), jnp.bfloat16),
            plgpu.SMEM((ROWS, COLUMNS, CHANNELS), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=3),
        ),
        grid=(groups, pl.cdiv(width, COLUMNS), pl.cdiv(height, ROWS), batch),
        grid_names=("group", "column", "row", "picture"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return run(x, weights)


gated_depthwise.defvjp(forward, backward)


def _tile(x, weights, y, value, gate, own_weights, result, barrier, *, channels):
    group, column, row, picture = (jax.lax.axis_index(name) for name in ("group", "column", "row", "picture"))
    channel = group * CHANNELS
    rows, columns = pl.ds(row * ROWS, ROWS + 2 * REACH), pl.ds(column * COLUMNS, COLUMNS + 2 * REACH)
    for half, target in enumerate((value, gate)):
        source = x.at[picture, rows, columns, pl.ds(half * channels + channel, CHANNELS)]
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.copy_gmem_to_smem(weights.at[group], own_weights, barrier)
    plgpu.barrier_wait(barrier)

    w = [[own_weights[half, tap].astype(jnp.float32) for tap in range(10)] for half in range(2)]
    sums = [{}, {}]  # of the rows that are not complete
    for i in range(ROWS + 2 * REACH):
        for half, source in enumerate((value, gate)):
            for j in range(3):
                read = source[i, pl.ds(j, COLUMNS)].astype(jnp.float32)
                for s in range(3):
                    if 0 <= i - s < ROWS:
                        before = sums[half].get(i - s, w[half][9])
                        sums[half][i - s] = before + read * w[half][3 * s + j]
        if i >= 2 * REACH:
            a, g = (part.pop(i - 2 * REACH) for part in sums)
            result[i - 2 * REACH] = (a * g / (1 + jnp.exp(-g))).astype(result.dtype)
    plgpu.commit_smem()
    tile = y.at[picture, pl.ds(row * ROWS, ROWS), pl.ds(column * COLUMNS, COLUMNS), pl.ds(channel, CHANNELS)]
    plgpu.copy_smem_to_gmem(result, tile)
    plgpu.wait_smem_to_gmem(0)
