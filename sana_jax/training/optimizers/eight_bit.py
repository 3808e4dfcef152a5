r"""Optimizer state in eight bits: decoded to float32 before every update, encoded again after it.

* CAME (SANA-1.5): the first moment of linear layers, which 1x1 convolutions are here too.
* Adam: both moments of linear layers and convolutions, v as its fourth root and m as the ratio $m / \sqrt v$.

Tensors of up to 16,384 elements a layer stay float32, as does everything else.

Adam's moments are not coded as they are, because m is divided by the root of v. How far updates are from float32's,
relative to their size, in blocks of 2,240 gradients whose scales differ (lognormal, sigma 1) and of which 2 % are
always zero, over 4,000 steps of b2 = 0.999; and the same while the scales drift (by sigma 1.5 in the first half):

    state                                              error    drifting
    m and v linear                                     2,427      50,810   most of v rounds to zero
    m linear, fourth root of v                         2,174      49,466   m of a weight without gradient rounds to more
    m / sqrt(v) linear, fourth root of v                0.10        0.69   the code's error is the update's own
    the same, the root rounded by `moving_threshold`    0.10        0.27   v moves by 1/1000 a step, codes by more
"""

import math

import jax
import jax.numpy as jnp
import optax

from sana_jax.parallel.sharding import is_scanned, path_names, split_axis
from sana_jax.training.optimizers.blockwise import Blockwise, dequantise, moving_threshold, quantise
from sana_jax.training.optimizers.came import CameState, MatrixState, TensorState

MIN_ELEMENTS = 2**14
MIN_BLOCK = 32  # a block's scale and minimum take eight bytes
LAYERS = ("kernel", "group")  # not embeddings, whose rows differ too much, nor tables, norms and biases
TINY = float(jnp.finfo(jnp.float32).tiny)


def eight_bit(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`scale_by_came` or `optax.scale_by_adam` with its state in eight bits between updates."""

    def init(params):
        # Both start at zero, which is zero in either form; XLA would try to quantise the constant while it compiles.
        shapes = jax.eval_shape(lambda: encode(tx.init(params)))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def update(updates, state, params=None):
        updates, state = tx.update(updates, decode(state), params)
        return updates, encode(state)

    return optax.GradientTransformation(init, update)


def encode(state: optax.OptState) -> optax.OptState:
    """An optimizer's state with the float32 states of CAME and Adam in it turned to eight bits."""
    return _replaced(state, {CameState: _encode_came, optax.ScaleByAdamState: _encode_adam})


def decode(state: optax.OptState) -> optax.OptState:
    """The inverse of `encode`, but for what rounding has lost."""
    return _replaced(state, {CameState: _decode_came, optax.ScaleByAdamState: _decode_adam})


def block_axis(path, shape: tuple[int, ...]) -> int | None:
    """The axis that a parameter's blocks lie on: its last, or the one before where the last is what meshes split.

    So no mesh cuts a block, and none has a say in it: a checkpoint restores onto any other. Where a mesh does not
    divide the axis that is split first and splits another, the blocks' minima and maxima are reduced over devices.

    Returns:
      None for what stays float32.
    """
    names = path_names(path)
    layers = shape[0] if is_scanned(path) else 1
    if names[-1] not in LAYERS or math.prod(shape) <= MIN_ELEMENTS * layers:
        return None
    last = len(shape) - 1
    axis = last - 1 if split_axis(names) == last else last
    return axis if shape[axis] >= MIN_BLOCK else None


def _replaced(state, change):
    return jax.tree.map(
        lambda part: change[type(part)](part) if type(part) in change else part,
        state,
        is_leaf=lambda part: type(part) in change,
    )


def _encode_came(state: CameState) -> CameState:
    def one(path, tensor):
        axis = block_axis(path, tensor.momentum.shape)
        if axis is None or isinstance(tensor, TensorState):
            return tensor
        return tensor._replace(momentum=quantise(tensor.momentum, axis))

    tensors = jax.tree_util.tree_map_with_path(
        one, state.tensors, is_leaf=lambda x: isinstance(x, MatrixState | TensorState)
    )
    return CameState(tensors)


def _decode_came(state: CameState) -> CameState:
    return jax.tree.map(lambda x: dequantise(x) if _is_coded(x) else x, state, is_leaf=_is_coded)


def _encode_adam(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
    def ratio(path, m, v):
        axis = block_axis(path, v.shape)
        # Where v has vanished, so has m, to within a few times its root.
        return m if axis is None else quantise(m * jax.lax.rsqrt(jnp.maximum(v, TINY)), axis)

    def root(path, v):
        axis = block_axis(path, v.shape)
        return v if axis is None else quantise(jnp.sqrt(jnp.sqrt(v)), axis, moving_threshold(state.count))

    return state._replace(
        mu=jax.tree_util.tree_map_with_path(ratio, state.mu, state.nu),
        nu=jax.tree_util.tree_map_with_path(root, state.nu),
    )


def _decode_adam(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
    def first(m, v):
        return dequantise(m) * dequantise(v) ** 2 if _is_coded(m) else m

    def second(v):
        return dequantise(v) ** 4 if _is_coded(v) else v

    return state._replace(
        mu=jax.tree.map(first, state.mu, state.nu, is_leaf=_is_coded),
        nu=jax.tree.map(second, state.nu, is_leaf=_is_coded),
    )


def _is_coded(x) -> bool:
    return isinstance(x, Blockwise)
