r"""CAME (Luo et al., 2023) as SANA uses it: Adafactor's factored second moment, confidence-guided.

Per tensor, gradient g in fp32, all statistics start at 0 and are not bias-corrected:

    u  = g^2 + eps0
    R  = b2 R + (1 - b2) mean_cols(u),   C = b2 C + (1 - b2) mean_rows(u)
    g' = g / sqrt(R / mean(R)) / sqrt(C)          (not a matrix: V = b2 V + (1 - b2) u,  g' = g / sqrt(V))
    g' = g' / max(1, rms(g') / clip_threshold)
    m  = b1 m + (1 - b1) g'
    r  = (g' - m)^2 + eps1
    Rr = b3 Rr + (1 - b3) mean_cols(r),  Cr likewise
    update = m / sqrt(Rr / mean(Rr)) / sqrt(Cr)   (not a matrix: update = m)

Source: NVlabs/Sana `CAMEWrapper`. Parameters stacked over layers are treated layer by layer,
and a projection kept as [in, k, out] (k projections side by side) as the matrix [in, k * out] that it is in the public
code. Rows and columns are interchangeable, since mean(R) = mean(C): our [in, out] gives the public [out, in]'s update.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sana_jax.parallel.sharding import is_scanned, path_names


class MatrixState(NamedTuple):
    """Statistics of a factored tensor; the means keep their reduced axes with size 1."""

    momentum: jax.Array
    rows: jax.Array
    columns: jax.Array
    residual_rows: jax.Array
    residual_columns: jax.Array


class TensorState(NamedTuple):
    """Statistics of a tensor that is not a matrix."""

    momentum: jax.Array
    second_moment: jax.Array


class CameState(NamedTuple):
    """State of `scale_by_came`: one MatrixState or TensorState for each parameter, at the parameter's place."""

    tensors: optax.Params


def matrix_axes(path, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(row axes, column axes) of a parameter that CAME factors; None where it is not a matrix.

    Matrices are linear kernels, which 1x1 convolutions are here too, embeddings and the scale-and-shift tables. Biases,
    norm weights, depthwise and larger convolutions are not.
    """
    first = 1 if is_scanned(path) else 0
    axes, name = tuple(range(first, len(shape))), path_names(path)[-1]
    if name == "bias":  # of several projections side by side it is [k, out], publicly a vector
        return None
    if len(axes) == 2:
        return axes[:1], axes[1:]
    if len(axes) == 3 and name == "group":  # [groups, in, out], publicly [groups * out, in, 1, 1]
        return (axes[0], axes[2]), (axes[1],)
    if len(axes) == 3 and name == "lora_up":  # [k, r, out]
        return axes[:2], axes[2:]
    if len(axes) == 3 and name == "lora_down":  # [in, k, r]
        return axes[:1], axes[1:]
    if len(axes) == 3 and shape[axes[0]] > shape[axes[1]]:  # [in, k, out]; a depthwise kernel is [3, 3, channels]
        return axes[:1], axes[1:]
    return None


def scale_by_came(
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip_threshold: float = 1.0,
) -> optax.GradientTransformation:
    """The update of CAME, without learning rate and weight decay; see the module's docstring.

    Without bias correction the first updates of a matrix are about 11 times the learning rate, and fall as the residual
    average fills over about 1 / (1 - b3) steps: use a warm-up.
    """

    def ema(average, value, decay):
        return decay * average + (1 - decay) * value

    def init(params):
        def one(path, p):
            momentum = jnp.zeros(p.shape, jnp.float32)
            axes = matrix_axes(path, p.shape)
            if axes is None:
                return TensorState(momentum, momentum)
            rows, columns = (jnp.mean(momentum, axis, keepdims=True) for axis in (axes[1], axes[0]))
            return MatrixState(momentum, rows, columns, rows, columns)

        return CameState(jax.tree_util.tree_map_with_path(one, params))

    def factored(rows, columns, row_axes):
        """1 / sqrt of the rank-one estimate rows x columns / mean(rows)."""
        return jax.lax.rsqrt(rows / jnp.mean(rows, row_axes, keepdims=True)) * jax.lax.rsqrt(columns)

    def one(path, g, state):
        dtype, g = g.dtype, g.astype(jnp.float32)
        axes = matrix_axes(path, g.shape)
        layer_axes = tuple(range(1 if is_scanned(path) else 0, g.ndim))
        square = g**2 + eps[0]
        if axes is None:
            second = ema(state.second_moment, square, b2)
            scaled = g * jax.lax.rsqrt(second)
        else:
            row_axes, column_axes = axes
            rows = ema(state.rows, jnp.mean(square, column_axes, keepdims=True), b2)
            columns = ema(state.columns, jnp.mean(square, row_axes, keepdims=True), b2)
            scaled = g * factored(rows, columns, row_axes)
        rms = jnp.sqrt(jnp.mean(scaled**2, layer_axes, keepdims=True))
        scaled = scaled / jnp.maximum(1.0, rms / clip_threshold)
        momentum = ema(state.momentum, scaled, b1)
        if axes is None:
            return momentum.astype(dtype), TensorState(momentum, second)
        residual = (scaled - momentum) ** 2 + eps[1]
        residual_rows = ema(state.residual_rows, jnp.mean(residual, column_axes, keepdims=True), b3)
        residual_columns = ema(state.residual_columns, jnp.mean(residual, row_axes, keepdims=True), b3)
        step = momentum * factored(residual_rows, residual_columns, row_axes)
        return step.astype(dtype), MatrixState(momentum, rows, columns, residual_rows, residual_columns)

    def update(updates, state, params=None):
        del params
        pairs = jax.tree_util.tree_map_with_path(one, updates, state.tensors)
        steps = jax.tree.map(lambda _, pair: pair[0], updates, pairs)
        tensors = jax.tree.map(lambda _, pair: pair[1], updates, pairs)
        return steps, CameState(tensors)

    return optax.GradientTransformation(init, update)
