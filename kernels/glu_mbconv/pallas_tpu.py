r"""The gated middle of the Mix-FFN on TPUs (Mosaic): value and gate are read once, the result is written once.

With $x$ for either half and $u = \mathrm{SiLU}(x)$, $y_{ij} = b + \sum_{ab} w_{ab}\,u_{i+a-1,\,j+b-1}$ and the result is
$o = y^v\,\mathrm{SiLU}(y^g)$. Given $\dot o$, the gradients are

$$\dot y^v = \dot o\,\mathrm{SiLU}(y^g), \quad \dot y^g = \dot o\,y^v\,\mathrm{SiLU}'(y^g), \quad
  \dot x_{ij} = \mathrm{SiLU}'(x_{ij}) \sum_{ab} w_{ab}\,\dot y_{i+1-a,\,j+1-b}, \quad
  \dot w_{ab} = \sum_{ij} u_{i+a-1,\,j+b-1}\,\dot y_{ij}, \quad \dot b = \sum_{ij} \dot y_{ij}.$$

XLA makes several passes over these grids, the widest activations of the model, and keeps y between the passes. Here the
forward kernel reads x and writes o, and the backward kernel reads x and $\dot o$, computes y again and writes $\dot x$: nothing
else of this width touches the memory. All arithmetic is float32.

A kernel works on strips of rows (`tpu_strips`) with two rows above and below: y next to the strip, which $\dot x$ needs, needs u
two rows away. Channels never mix, so that lanes beyond the last one do no harm.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float
from sana_jax.kernels.tpu_groups import LANES
from sana_jax.kernels.tpu_strips import HALO, LARGEST_WIDTH, Strip, add_up, call_on_strips, taps


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
@functools.partial(jax.jit, static_argnums=4)  # traced once for all layers, on every platform
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
    return call_on_strips(
        functools.partial(_forward_kernel, row_padding=row_padding),
        grids=(value, gate),
        weights=(*_split(kernel.reshape(9, -1)), *_split(bias.reshape(1, -1))),
        out_grids=(out,),
        strips_of=out,
        scratch=(HALO, HALO),
        name="gated_depthwise_forward",
        operations=2 * 20,
        transcendentals=2,
    )[0]


def _gated_depthwise_forward(value, gate, kernel, bias, row_padding):
    return gated_depthwise(value, gate, kernel, bias, row_padding), (value, gate, kernel, bias)


@functools.partial(jax.jit, static_argnums=0)
def _gated_depthwise_backward(row_padding, residuals, g):
    value, gate, kernel, bias = residuals
    dvalue, dgate, *dweights = call_on_strips(
        functools.partial(_backward_kernel, row_padding=row_padding),
        grids=(value, gate, g),
        weights=(*_split(kernel.reshape(9, -1)), *_split(bias.reshape(1, -1))),
        out_grids=(value, gate),
        strips_of=value,
        scratch=(HALO, HALO, 1, 1),
        name="gated_depthwise_backward",
        operations=2 * 60,
        transcendentals=3,
        sums=True,
    )
    dkernel, dbias = (jnp.concatenate(pair, axis=-1) for pair in (dweights[:2], dweights[2:]))
    return dvalue, dgate, dkernel.reshape(kernel.shape).astype(kernel.dtype), dbias[0].astype(bias.dtype)


gated_depthwise.defvjp(_gated_depthwise_forward, _gated_depthwise_backward)


def _split(array):
    return jnp.split(array, 2, axis=-1)


def _forward_kernel(strip: Strip, height, value, gate, wv, wg, bv, bg, out, uv, ug, *, row_padding):
    strip.fill(uv, value, height, _silu)
    strip.fill(ug, gate, height, _silu)

    def row(i, _):
        first = i + HALO - row_padding  # of the three rows that the convolution reads
        y, g = _convolved(strip, uv, first, wv, bv), _convolved(strip, ug, first, wg, bg)
        out[i] = (y * g * jax.nn.sigmoid(g)).astype(out.dtype)

    lax.fori_loop(0, strip.rows, row, None)


def _backward_kernel(
    strip: Strip, height, value, gate, g, wv, wg, bv, bg, dv, dg, dwv, dwg, dbv, dbg, uv, ug, ev, eg, *, row_padding
):
    """The scratch memory holds u of both halves, and the gradients of y, e, of the strip and a row above and below."""
    strip.fill(uv, value, height, _silu)
    strip.fill(ug, gate, height, _silu)
    strip.between_margins(ev)
    strip.between_margins(eg)

    def gradient_of_y(j, do):
        k = j - row_padding  # e's row; that of the result lies row_padding further down
        row = strip.first + k - 1
        real = (row >= 1 - row_padding) & (row < height - (1 - row_padding))
        y, z = _convolved(strip, uv, k, wv, bv), _convolved(strip, ug, k, wg, bg)
        s = jax.nn.sigmoid(z)
        strip.put(ev, k, do * z * s, real)
        strip.put(eg, k, do * y * s * (1 + z * (1 - s)), real)

    strip.each_row(g, row_padding, row_padding + strip.rows + 2, gradient_of_y)

    def row(i, sums):
        added = []
        for x_refs, u, e, w, dx in ((value, uv, ev, wv, dv), (gate, ug, eg, wg, dg)):
            x = x_refs[1][i].astype(jnp.float32)
            s = jax.nn.sigmoid(x)
            dx[i] = (strip.convolve_back(e, i + 2, w) * s * (1 + x * (1 - s))).astype(dx.dtype)
            own = strip.get(e, i + 1)
            added += [strip.get(u, i + 1 + a, shift) * own for a, shift, _ in taps(w)] + [own]
        return [total + x.sum(0, keepdims=True) for total, x in zip(sums, added, strict=True)]

    sums = lax.fori_loop(0, strip.rows, row, [jnp.zeros((1, LANES), jnp.float32)] * 20)
    totals = sums[:9], sums[10:19], sums[9:10], sums[19:]
    add_up([(ref, jnp.concatenate(rows)) for ref, rows in zip((dwv, dwg, dbv, dbg), totals, strict=True)])


def _silu(x):
    return x * jax.nn.sigmoid(x)


def _convolved(strip, u, row, w_ref, b_ref):
    return strip.convolve(u, row, w_ref) + b_ref[...].astype(jnp.float32)
