r"""Optimizer state in eight bits: decoded to float32 before every update, encoded again after it.

* CAME (SANA-1.5; `sana.md` 6.4): the first moment of linear layers and 1x1 convolutions.
* Adam: both moments of every tensor, v as its fourth root and m as the ratio $m / \sqrt v$.

Tensors of up to 16,384 elements a layer stay float32, as does everything else.

Adam's moments are not coded as they are, because m is divided by the root of v. The distance of the update from that of
float32, relative to the latter's size, after 6,000 steps of b2 = 0.999 on gradients whose scales differ within a block
(lognormal, sigma 1), 2 % of them always zero; and the same while these scales drift (by sigma 1.5 over 3,000 steps):

    state                                                    error   drifting
    m and v linear                                             710      3,490   most of v rounds to zero
    m linear, fourth root of v                                 654      3,450   m of a weight without gradient does not
    m and v by the dynamic map of bitsandbytes                0.14       0.59
    m / sqrt(v) linear, fourth root of v                      0.09       0.53   the code's error is the update's
    the same, the root rounded by `moving_threshold`          0.08       0.14   v moves by 1/1000 a step, codes by more
"""

import math

import jax
import jax.numpy as jnp
import optax

from sana_jax.parallel.sharding import is_scanned, path_names
from sana_jax.training.optimizers.blockwise import (
    MIN_BLOCK,
    Blockwise,
    block_size,
    dequantise,
    moving_threshold,
    quantise,
)
from sana_jax.training.optimizers.came import CameState, MatrixState, TensorState

MIN_ELEMENTS = 2**14


def eight_bit(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`scale_by_came` or `optax.scale_by_adam` with its state in eight bits between updates."""

    def init(params):
        return encode(tx.init(params))

    def update(updates, state, params=None):
        updates, state = tx.update(updates, decode(state), params)
        return updates, encode(state)

    return optax.GradientTransformation(init, update)


def encode(state: optax.OptState) -> optax.OptState:
    """An optimizer's state with the float32 states of CAME and Adam in it turned to eight bits."""
    return _replaced(state, {CameState: _encode_came, optax.ScaleByAdamState: _encode_adam})


def decode(state: optax.OptState) -> optax.OptState:
    """The inverse of `encode`, but for what rounding has lost."""
    return _replaced(state, {CameState: _dequantised, optax.ScaleByAdamState: _decode_adam})


def is_coded(path, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is large enough for eight bits, and its rows can be cut into blocks."""
    layers = shape[0] if is_scanned(path) else 1
    return math.prod(shape) > MIN_ELEMENTS * layers and block_size(shape[-1]) >= MIN_BLOCK


def _replaced(state, change):
    return jax.tree.map(
        lambda part: change[type(part)](part) if type(part) in change else part,
        state,
        is_leaf=lambda part: type(part) in change,
    )


def _encode_came(state: CameState) -> CameState:
    def one(path, tensor):
        # In the public optimizer the layer's type decides; embeddings and the scale-and-shift tables are no layers of it.
        is_layer = isinstance(tensor, MatrixState) and path_names(path)[-1] in ("kernel", "group")
        if not is_layer or not is_coded(path, tensor.momentum.shape):
            return tensor
        return tensor._replace(momentum=quantise(tensor.momentum))

    return CameState(
        jax.tree_util.tree_map_with_path(
            one, state.tensors, is_leaf=lambda x: isinstance(x, MatrixState | TensorState)
        )
    )


def _encode_adam(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
    def ratio(path, m, v):
        return quantise(m * jax.lax.rsqrt(jnp.maximum(v, _TINY))) if is_coded(path, v.shape) else m

    def root(path, v):
        if not is_coded(path, v.shape):
            return v
        return quantise(jnp.sqrt(jnp.sqrt(v)), moving_threshold(state.count, v.shape[-1]))

    return state._replace(
        mu=jax.tree_util.tree_map_with_path(ratio, state.mu, state.nu),
        nu=jax.tree_util.tree_map_with_path(root, state.nu),
    )


def _decode_adam(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
    def first(m, v):
        return dequantise(m) * dequantise(v) ** 2 if isinstance(m, Blockwise) else m

    def second(v):
        return dequantise(v) ** 4 if isinstance(v, Blockwise) else v

    return state._replace(
        mu=jax.tree.map(first, state.mu, state.nu, is_leaf=_is_blockwise),
        nu=jax.tree.map(second, state.nu, is_leaf=_is_blockwise),
    )


def _dequantised(state):
    return jax.tree.map(lambda x: dequantise(x) if _is_blockwise(x) else x, state, is_leaf=_is_blockwise)


def _is_blockwise(x) -> bool:
    return isinstance(x, Blockwise)


_TINY = float(jnp.finfo(jnp.float32).tiny)  # where v has vanished, so has m to within a few times its root
