"""The dense convolution of DC-AE and the one place that chooses how it is computed.

XLA's convolution is the right one on GPU and TPU. On CPU (x86 with AMX, JAX 0.10 to 0.12) it reaches 40 to 200 GFLOP/s
in any dtype and 30 to 60 for the kernel's gradient, where bf16 matrix products reach 600 to 900. Gathering patches and
multiplying pays on coarse grids; on fine ones the gathering costs more than it saves. Measured, GFLOP/s on two cores:

                            forward              kernel's gradient
                            XLA     products     XLA     products
    bf16  32x32   64->64    138     133          50      115
    bf16  16x16 128->128    196     317          39      204
    bf16    8x8 256->256    118     497          74      459
    bf16    4x4 512->512     62     537          155     513
    fp32  32x32   64->64    156      60          37       42
    fp32  16x16 128->128    150      75          30       88
    fp32    8x8 256->256    108     110          71
    fp32    4x4 512->512     53     130          110
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.kernels.dense.api import sum_positions
from sana_jax.kernels.derivatives import custom_vjp


@functools.partial(custom_vjp, nondiff_argnums=(3, 4))
def conv2d(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k k C D"],
    bias: Float[Array, "D"] | None = None,
    stride: int = 1,
    row_padding: int | None = None,
) -> Float[Array, "B h w D"]:
    """Convolution (cross-correlation) plus bias with k // 2 zeros of padding on every side; k is odd.

    `row_padding` rows of zeros above and below in place of k // 2, where x brings its neighbours' rows along. Sum and bias
    are float32 and rounded once to the dtype of x, as by PyTorch. Not so on GPU: cuDNN has no convolution of bfloat16 into
    float32, so there it is rounded before the bias unless XLA makes one call of both.
    """

    def on_cpu(x, kernel):
        if stride == 1 and row_padding is None and _coarse(x):
            return conv2d_products(x, kernel)
        return conv2d_lax(x, kernel, stride, row_padding, jnp.float32)

    def on_tpu(x, kernel):
        return conv2d_lax(x, kernel, stride, row_padding, jnp.float32)

    def elsewhere(x, kernel):
        return conv2d_lax(x, kernel, stride, row_padding).astype(jnp.float32)

    out = jax.lax.platform_dependent(x, kernel, cpu=on_cpu, tpu=on_tpu, default=elsewhere)
    if bias is not None:
        out += bias
    return out.astype(x.dtype)


def _forward(x, kernel, bias, stride, row_padding):
    return conv2d(x, kernel, bias, stride, row_padding), (x, kernel, bias)


def _backward(stride, row_padding, residuals, g):
    x, kernel, bias = residuals
    by_products = stride == 1 and row_padding is None

    def on_cpu(x, kernel, g):
        return conv2d_products_vjp(x, kernel, g, products_for_input=_coarse(g))

    def by_xla(x, kernel, g):
        return jax.vjp(functools.partial(conv2d_lax, stride=stride, row_padding=row_padding), x, kernel)[1](g)

    dx, dkernel = jax.lax.platform_dependent(x, kernel, g, cpu=on_cpu if by_products else by_xla, default=by_xla)
    return dx, dkernel, None if bias is None else sum_positions(g).astype(bias.dtype)


conv2d.defvjp(_forward, _backward)


def conv2d_lax(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k k C D"],
    stride: int = 1,
    row_padding: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "B h w D"]:
    """XLA's convolution, its result in `dtype` (None: that of x)."""
    padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
    if row_padding is not None:
        padding[0] = (row_padding, row_padding)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=dtype,
    )


def conv2d_products(x: Float[Array, "B H W C"], kernel: Float[Array, "k k C D"]) -> Float[Array, "B H W D"]:
    r"""Stride-1 convolution as k matrix products: $y_{r,s} = \sum_i R(x)_{r+i,s} W_i$ over the kernel's rows i.

    R(x) holds, for every pixel, its k horizontal neighbours side by side: a third of the memory of full patches. The
    result is fp32.
    """
    return _combine(_row_patches(x, kernel.shape[:2]), kernel)


def conv2d_products_vjp(x, kernel, g, *, products_for_input: bool):
    r"""Both gradients; those of the kernel always by products.

    With R of the output's cotangent g: $\bar W_{-i} = x^T R(g)_i$; $\bar x$ is the convolution of g with the mirrored
    kernel. The contraction runs over picture and position as two axes: XLA then writes the transposed x out and reaches
    the fast product, which it does not where a single leading axis is contracted (130 against 450 GFLOP/s).
    """
    kh, kw, c, d = kernel.shape
    height = x.shape[1]
    rows = _row_patches(g, (kh, kw))
    mirrored = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    dx = _combine(rows, mirrored).astype(x.dtype) if products_for_input else conv2d_lax(g, mirrored)
    dkernel = jnp.stack(
        [jnp.einsum("bhwc,bhwd->cd", x, rows[:, i : i + height], preferred_element_type=jnp.float32) for i in range(kh)]
    )
    dkernel = jnp.flip(dkernel.reshape(kh, c, kw, d).transpose(0, 2, 1, 3), (0, 1))
    return dx, dkernel.astype(kernel.dtype)


def _coarse(x) -> bool:
    """Whether products beat XLA's convolution on CPU (table above)."""
    return x.shape[1] * x.shape[2] <= (256 if x.dtype.itemsize == 2 else 64)


def _row_patches(x: Float[Array, "B H W C"], size: tuple[int, int]) -> Float[Array, "B Hp W K"]:
    """Zero-padded x with each pixel's horizontal neighbours side by side in its channels."""
    width = x.shape[2]
    padded = jnp.pad(x, ((0, 0), *((k // 2, k // 2) for k in size), (0, 0)))
    rows = jnp.concatenate([padded[:, :, j : j + width] for j in range(size[1])], axis=-1)
    return jax.lax.optimization_barrier(rows)  # else XLA fuses the gather into the product and loses the fast one


def _combine(rows: Float[Array, "B Hp W K"], kernel: Float[Array, "k k C D"]) -> Float[Array, "B H W D"]:
    """The sum over kernel rows of shifted row patches times that row's weights, in fp32."""
    kh, kw, c, d = kernel.shape
    height = rows.shape[1] - kh + 1
    total = 0.0
    for i in range(kh):
        shifted = jax.lax.optimization_barrier(rows[:, i : i + height])
        total += jnp.einsum("bhwk,kd->bhwd", shifted, kernel[i].reshape(kw * c, d), preferred_element_type=jnp.float32)
    return total
