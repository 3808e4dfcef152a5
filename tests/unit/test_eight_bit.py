"""Optimizer state in eight bits: the code, which tensors it takes, and both optimizers against their float32 selves."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_optimizers import NumpyCame

from sana_jax.models import presets
from sana_jax.models.transformer import SanaTransformer
from sana_jax.parallel.sharding import path_names
from sana_jax.training.optimizers.blockwise import dequantise, moving_threshold, quantise
from sana_jax.training.optimizers.came import scale_by_came
from sana_jax.training.optimizers.eight_bit import decode, eight_bit, encode
from sana_jax.weights.folder import abstract_params

ATTENTION = ("transformer", "blocks", "self_attention")
SIZE = 160  # of square matrices; 25,600 elements


def nested(path, value):
    return functools.reduce(lambda tree, name: {name: tree}, reversed(path), value)


def coded(state):
    """Names of the arrays of a state that are in eight bits, without their parts'."""
    return {
        "/".join(path_names(path)[:-1]) for path, x in jax.tree_util.tree_leaves_with_path(state) if x.dtype == "uint8"
    }


def state_bytes(tx, params):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))


matrices = arrays.arrays(
    np.float32,
    (4, 40),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(matrices, st.sampled_from([0, 1]), st.sampled_from([0.0, 0.25, 0.5, 0.9]))
def test_a_coded_array_comes_back_to_within_its_step(x, axis, threshold):
    result = quantise(jnp.asarray(x), axis, threshold)
    span = np.ptp(x.astype(np.float64), axis=axis, keepdims=True)
    rounding = 1e-6 * np.abs(x).max(axis, keepdims=True) + 4e-36  # where a scale would be subnormal
    allowed = span / 255 * max(threshold, 1 - threshold) * 1.001 + rounding
    assert result.codes.shape == x.shape and result.scale.shape == result.minimum.shape == span.shape
    assert np.all(np.abs(np.asarray(dequantise(result), np.float64) - x) <= allowed)


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False), st.floats(0, 0.99))
def test_a_block_of_equal_elements_comes_back_exactly(value, threshold):
    x = jnp.full((3, 40), value, jnp.float32)
    np.testing.assert_array_equal(dequantise(quantise(x, 1, threshold)), x)


def test_a_block_that_is_not_finite_stays_so_and_spares_the_others():
    x = jnp.ones((3, 40)).at[1, 7].set(jnp.nan).at[2, 3].set(jnp.inf)
    back = dequantise(quantise(x, 1))
    assert jnp.all(back[0] == 1) and not jnp.any(jnp.isfinite(back[1:]))


def test_moving_thresholds_round_without_a_bias():
    x = jax.random.uniform(jax.random.key(0), (4, 100))
    mean = jnp.mean(jax.vmap(lambda n: dequantise(quantise(x, 1, moving_threshold(n))))(jnp.arange(500)), 0)
    step = jnp.ptp(x, axis=1, keepdims=True) / 255
    assert jnp.max(jnp.abs(mean - x) / step) < 0.01


PARAMS = {
    "transformer": {
        "blocks": {
            "self_attention": {
                "qkv": {"kernel": jnp.zeros((2, SIZE, 3, SIZE))},
                "out": {"kernel": jnp.zeros((2, SIZE, SIZE)), "bias": jnp.zeros((2, SIZE))},
            },
            "feed_forward": {"depthwise": {"kernel": jnp.zeros((2, 3, 3, 4096))}},
            "cross_attention": {"out": {"kernel": jnp.zeros((2, 100, 100))}},  # 10,000 elements a layer
            "scale_shift_table": jnp.zeros((2, 6, 4096)),
        },
        "patch_embed": {"kernel": jnp.zeros((4, SIZE))},
        "time_embed": {"linear_2": {"kernel": jnp.zeros((SIZE, SIZE))}},
    },
    "text_encoder": {"embedding": {"embedding": jnp.zeros((512, SIZE))}},
}
CODED = {
    "transformer/blocks/self_attention/qkv/kernel",
    "transformer/blocks/self_attention/out/kernel",
    "transformer/time_embed/linear_2/kernel",
}


def test_large_linear_layers_are_coded_and_nothing_else():
    came = jax.eval_shape(eight_bit(scale_by_came()).init, PARAMS)
    adam = jax.eval_shape(eight_bit(optax.scale_by_adam()).init, PARAMS)
    assert coded(came) == {f"tensors/{name}/momentum" for name in CODED}
    assert coded(adam) == {f"{moment}/{name}" for moment in ("mu", "nu") for name in CODED}


def test_blocks_lie_on_the_last_axis_unless_meshes_split_that():
    attention = jax.eval_shape(eight_bit(scale_by_came()).init, PARAMS).tensors["transformer"]["blocks"][
        "self_attention"
    ]
    assert attention["qkv"]["kernel"].momentum.scale.shape == (2, SIZE, 3, 1)
    assert attention["out"]["kernel"].momentum.scale.shape == (2, 1, SIZE)


def test_came_in_eight_bits_takes_an_eighth_of_adamws_memory_at_1600m():
    params = {"transformer": abstract_params(SanaTransformer(presets.sana_1600m()))}
    adam = state_bytes(optax.scale_by_adam(), params)
    assert adam == pytest.approx(12.8e9, rel=0.005)
    assert state_bytes(eight_bit(scale_by_came()), params) == pytest.approx(1.64e9, rel=0.005)
    assert state_bytes(eight_bit(optax.scale_by_adam()), params) < adam / 3.9


@pytest.mark.parametrize("tx", [scale_by_came(), optax.scale_by_adam()])
def test_the_two_forms_of_a_state_turn_into_each_other(tx):
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), PARAMS)
    _, state = jax.jit(tx.update)(gradient, jax.jit(tx.init)(PARAMS))
    chained = (optax.EmptyState(), state)
    there = jax.jit(encode)(chained)
    assert jax.tree.structure(there[1]) == jax.tree.structure(jax.eval_shape(eight_bit(tx).init, PARAMS))
    back = jax.jit(decode)(there)
    assert jax.tree.structure(back) == jax.tree.structure(chained)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(chained), strict=True):
        assert jnp.max(jnp.abs(x - y)) <= 0.05 * jnp.max(jnp.abs(y))


class NumpyCame8bit(NumpyCame):
    """CAME-8bit of SANA-1.5 for one public tensor [out, in]: the first moment is coded after every step, in float64."""

    def __init__(self, shape, axis, **kwargs):
        super().__init__(shape, **kwargs)
        self.axis = axis

    def step(self, g):
        update = super().step(g)
        low, high = (f(self.m, axis=self.axis, keepdims=True) for f in (np.min, np.max))
        scale = (high - low) / 255
        codes = np.round((self.m - low) / np.where(scale > 0, scale, 1)).astype(np.uint8)
        self.m = codes * scale + low
        return update


def differences_from_numpy(tx, path, axis):
    """Of 50 updates from the transcription's, relative to the largest of each."""
    rng, shape = np.random.default_rng(0), (2, SIZE, SIZE)
    state, update = tx.init(nested(path, jnp.zeros(shape))), jax.jit(tx.update)
    references = [NumpyCame8bit((SIZE, SIZE), axis) for _ in range(2)]
    differences = []
    for _ in range(50):
        g = rng.normal(size=shape) * np.exp(rng.normal(size=shape))
        ours, state = update(nested(path, jnp.asarray(g, jnp.float32)), state)
        for layer, reference in enumerate(references):
            expected = reference.step(g[layer].T)
            difference = np.asarray(jax.tree.leaves(ours)[0])[layer].T - expected
            differences.append(np.abs(difference) / np.abs(expected).max())
    return np.array(differences)


@pytest.mark.parametrize(("layer", "axis"), [("self_attention/out", 1), ("cross_attention/query", 0)])
def test_came_in_eight_bits_follows_the_published_algorithm_for_50_steps(layer, axis):
    path = ("transformer", "blocks", *layer.split("/"), "kernel")
    found = differences_from_numpy(eight_bit(scale_by_came()), path, axis)
    # A first moment that lies between two codes may be rounded to the one in float32 and to the other in float64.
    assert np.quantile(found, 0.99) < 2e-5 and found.max() < 0.01
    for other in (scale_by_came(), eight_bit(scale_by_came(b3=0.999))):
        assert np.quantile(differences_from_numpy(other, path, axis)[:20], 0.99) > 1e-4


def test_blocks_along_the_other_axis_break_the_comparison():
    found = differences_from_numpy(eight_bit(scale_by_came()), (*ATTENTION, "out", "kernel"), 0)
    assert np.quantile(found, 0.99) > 1e-4


def test_adam_in_eight_bits_stays_close_to_adam_and_leaves_weights_without_gradient_alone():
    rng, path = np.random.default_rng(0), (*ATTENTION, "out", "kernel")
    scales = np.exp(rng.normal(size=(1, SIZE, SIZE))) * (rng.random((1, SIZE, SIZE)) > 0.02)
    exact, ours = optax.scale_by_adam(), eight_bit(optax.scale_by_adam())
    states = [tx.init(nested(path, jnp.zeros(scales.shape))) for tx in (exact, ours)]
    updates = [jax.jit(tx.update) for tx in (exact, ours)]
    for _ in range(50):
        g = nested(path, jnp.asarray(scales * rng.normal(size=scales.shape), jnp.float32))
        (a, b), states = zip(*(update(g, state) for update, state in zip(updates, states, strict=True)), strict=True)
    a, b = (jax.tree.leaves(x)[0] for x in (a, b))
    assert jnp.linalg.norm(a - b) < 0.05 * jnp.linalg.norm(a)
    assert not jnp.any(b[scales == 0])


def test_a_second_moment_in_eight_bits_follows_gradients_that_fall():
    """By a thousandth a step, which rounding to the nearest code would undo each time."""
    path, tx = (*ATTENTION, "out", "kernel"), eight_bit(optax.scale_by_adam())
    steady, fallen = (jnp.arange(SIZE) % 3 == i for i in (0, 1))  # the rest is small, and the blocks' minimum

    def step(state, n):
        g = jnp.where(steady | (fallen & (n < 500)), 1.0, jnp.where(fallen, 0.1, 0.01))
        return tx.update(nested(path, jnp.broadcast_to(g[:, None], (1, SIZE, SIZE))), state)[1], None

    state, _ = jax.lax.scan(step, tx.init(nested(path, jnp.zeros((1, SIZE, SIZE)))), jnp.arange(2500))
    v = jax.tree.leaves(decode(state).nu)[0][0]
    assert jnp.allclose(v[steady], 1 - 0.999**2500, rtol=0.02)
    assert jnp.allclose(v[fallen], 0.999**2000 - 0.999**2500 + 0.01 * (1 - 0.999**2000), rtol=0.2)
