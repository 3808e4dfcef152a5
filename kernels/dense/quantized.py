r"""Dense layer whose product is made of eight-bit codes, int8 or float8 (e4m3): for inference, it has no derivative.

    codes = x / scale, rounded;   scale = max |x| / the largest code

The input has one scale per token and the kernel one per output channel. Neither varies along the channels that are summed, so
that both stand before the sum:

    y[n, f] = scale_x[n] scale_w[f] \sum_c codes_x[n, c] codes_w[f, c] + bias[f]

A token's scale depends on that token alone: a picture stays the same whichever others are drawn beside it, and devices that
hold different tokens exchange nothing.

The kernel's codes lie with the summed axis last, [features, channels]. XLA for NVIDIA GPUs makes one cuBLASLt call (or a Triton
kernel, as its autotuner finds) of two matrices of codes that both lie so, without copying them: int8 with sums in int32, and
from Ada on float8 (`__cublas$lt$matmul$f8`). That call takes scales too, but only scalars; ours are multiplied after it.

Source: vector-wise quantisation, Dettmers et al. 2022 (LLM.int8()), section 2.1.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

SMALLEST = 2.0**-100  # a row is coded as though it had at least this value: zeros too have a scale, far from underflow
VECTOR = 64


def quantize(x: Float[Array, "*B C"], dtype) -> tuple[Shaped[Array, "*B C"], Float[Array, "*B"]]:
    """(codes of `dtype`, float32 scales), one scale for each row of the last axis.

    codes * scale is x to within half a scale with int8, whose codes are -127 to 127, and with float8_e4m3fn to within a
    sixteenth of each value, or 1/1024 of a scale where that is more. Rows of zeros give zeros; a row with a value that is
    not finite has a scale that is not.
    """
    x = x.astype(jnp.float32)
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = (jnp.iinfo if integer else jnp.finfo)(dtype).max
    scale = jnp.maximum(_largest(jnp.abs(x)), SMALLEST) / float(largest)
    codes = x / scale[..., None]
    return (jnp.round(codes) if integer else codes).astype(dtype), scale


def _largest(x):
    """The maximum of each row [..., C], on CPUs in two steps.

    XLA's loops for CPUs go through a last axis value by value. The first step compares vectors of 64 values; the barrier keeps
    the compiler from making one reduction of both.
    """

    def in_vectors(x):
        return lax.optimization_barrier(x.reshape(*x.shape[:-1], -1, VECTOR).max(-2)).max(-1)

    def at_once(x):
        return x.max(-1)

    return lax.platform_dependent(x, cpu=in_vectors if x.shape[-1] % VECTOR == 0 else at_once, default=at_once)


@jax.custom_jvp
def quantized_dense(
    x: Float[Array, "*B C"],
    codes: Shaped[Array, "D C"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"] | None = None,
) -> Float[Array, "*B D"]:
    """x @ (codes * scale).T + bias in the dtype of x, which is quantised to the dtype of the codes; rounded once after that.

    int8 is summed exactly up to 133,000 channels. Sums of float8 are float32, but on Hopper cuBLASLt keeps about 14 bits of
    them between the steps of a product (DeepSeek-V3, section 3.3.2).

    Raises:
      NotImplementedError: it is differentiated.
    """
    rows, row_scale = quantize(x.reshape(-1, x.shape[-1]), codes.dtype)
    wide = jnp.int32 if jnp.issubdtype(codes.dtype, jnp.integer) else jnp.float32
    y = lax.dot_general(rows, codes, (((1,), (1,)), ((), ())), preferred_element_type=wide).astype(jnp.float32)
    y = y * row_scale[:, None] * scale
    if bias is not None:
        y = y + bias
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


@quantized_dense.defjvp
def _no_derivative(primals, tangents):
    raise NotImplementedError(
        "a quantised dense layer has no derivative, since rounding has none: train with float parameters and quantise those."
    )
