"""A further scale of attention: the TPU's kernels, interpreted, and XLA's form, against the formula.

Memory that nobody wrote is NaN in the interpreter.
"""

import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import strategies as st
from interpreted_strips import small_strips
from sana_jax.kernels.multiscale import api, reference

BOUND = {"float32": 1e-5, "bfloat16": 1e-2}


def arrays(*shape, side, head_dim, row_padding, dtype="float32", count=1):
    """Grids, their weights and gradients."""
    batch, height, width, channels = shape
    rng = np.random.default_rng(shape)
    grids = rng.standard_normal((count, *shape))
    depth = rng.standard_normal((count, side, side, channels))
    group = rng.standard_normal((count, channels // head_dim, head_dim, head_dim))
    g = rng.standard_normal((count, batch, height + 2 * row_padding - side + 1, width, channels))
    grids, depth, group, g = (jnp.asarray(a, dtype) for a in (grids, depth, group, g))
    return tuple(grids), depth, group, tuple(g)


def errors(*shape, implementation="pallas_tpu", dtype, row_padding, **options):
    """Relative errors of the results and of the gradients of grids and weights."""

    def value_and_gradients(function, *inputs, g):
        y, vjp = jax.vjp(functools.partial(function, row_padding=row_padding), *inputs)
        return jax.tree.leaves((y, vjp(g)))

    *inputs, g = arrays(*shape, dtype=dtype, row_padding=row_padding, **options)
    ours = functools.partial(api.further_scale, implementation=implementation)
    with small_strips():
        found = jax.jit(functools.partial(value_and_gradients, ours))(*inputs, g=g)
    *inputs, g = jax.tree.map(lambda x: x.astype(jnp.float32), (*inputs, g))
    expected = value_and_gradients(reference.further_scale, *inputs, g=g)
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    return [
        np.linalg.norm(np.float64(x) - np.float64(y)) / np.linalg.norm(np.float64(y))
        for x, y in zip(found, expected, strict=True)
    ]


def test_the_formula_mixes_the_sums_of_a_head():
    grids, depth, group, _ = arrays(1, 3, 4, 4, side=3, head_dim=2, row_padding=1, count=2)
    found = reference.further_scale(grids, depth, group, row_padding=1)[1]
    x, depth, group = (np.float64(a[1]) for a in (grids, depth, group))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = sum(padded[:, a : a + 3, b : b + 4] * depth[a, b] for a in range(3) for b in range(3))
    expected = np.stack([y[..., :2] @ group[0], y[..., 2:] @ group[1]], axis=-2).reshape(x.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("implementation", "count"), [("xla", 3), ("pallas_tpu", 1)])
@pytest.mark.parametrize(
    ("side", "row_padding", "dtype"), [(5, 2, "float32"), (5, 0, "bfloat16"), (3, 1, "bfloat16"), (3, 0, "float32")]
)
def test_value_and_gradients_are_those_of_the_formula(implementation, count, side, row_padding, dtype):
    # Two and a half strips of four rows.
    options = dict(side=side, head_dim=32, row_padding=row_padding, dtype=dtype, count=count)
    assert max(errors(1, 10, 4, 128, implementation=implementation, **options)) < BOUND[dtype]


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=3, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
def test_any_grid_will_do(data):
    side = data.draw(st.sampled_from([3, 5]))
    row_padding = data.draw(st.integers(0, side // 2))
    height = data.draw(st.integers(2, 9)) + side - 1 - 2 * row_padding
    shape = data.draw(st.integers(1, 2)), height, data.draw(st.integers(1, 17)), 128 * data.draw(st.integers(1, 2))
    dtype, head_dim = data.draw(st.sampled_from(list(BOUND))), data.draw(st.sampled_from([8, 32, 128]))
    found = errors(*shape, side=side, head_dim=head_dim, row_padding=row_padding, dtype=dtype)
    assert max(found) < BOUND[dtype]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 4, 4, 192), {}, "192 channels in groups of 32"),
        ((1, 4, 4, 384), dict(head_dim=48), "384 channels in groups of 48"),
        ((1, 1, 4, 128), {}, "the grid is 1x4"),
        ((1, 4, 513, 128), {}, "at most 512 positions"),
        ((1, 8, 8, 128), dict(side=7, row_padding=3), "the convolution is 7x7 with row_padding=3; it must be 3x3"),
        ((1, 4, 4, 128), dict(dtype="float16"), "the grids are float16"),
    ],
)
def test_a_forced_kernel_that_cannot_run_says_why_and_is_not_chosen(shape, options, message):
    options = dict(side=5, head_dim=32, row_padding=2) | options
    *inputs, _ = arrays(*shape, **options)
    with pytest.raises(ValueError, match=f"implementation='pallas_tpu' cannot run: .*{message}"):
        api.further_scale(*inputs, implementation="pallas_tpu")
    assert "pallas_call" not in str(jax.jit(api.further_scale).trace(*inputs).jaxpr)


def test_the_platform_chooses_where_the_kernels_can_run():
    *inputs, _ = arrays(1, 4, 4, 128, side=5, head_dim=32, row_padding=2)
    assert "pallas_call" in str(jax.jit(api.further_scale).trace(*inputs).jaxpr)


def test_unknown_names_and_other_shapes_are_refused():
    grids, depth, group, _ = arrays(1, 4, 4, 128, side=5, head_dim=32, row_padding=2)
    with pytest.raises(ValueError, match="implementation='triton' is unknown; use None, xla, pallas_tpu"):
        api.further_scale(grids, depth, group, implementation="triton")


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu", None])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda grids, depth, group: (grids, depth, group[:, :3]),
            "128 channels, the kernels 128, and there are 3 matrices",
        ),
        (lambda grids, depth, group: (grids, depth[..., :64], group), "128 channels, the kernels 64, "),
        (lambda grids, depth, group: (grids, depth[:1], group), "with weights for 1 and matrices for 2"),
        (
            lambda grids, depth, group: ((grids[0], grids[1][:, 1:]), depth, group),
            "(1, 4, 4, 128), (1, 3, 4, 128), with",
        ),
        (lambda grids, depth, group: ((), depth, group), "the grids are none"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(implementation, change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users call it
    *inputs, _ = arrays(1, 4, 4, 128, side=5, head_dim=32, row_padding=2, count=2)
    with pytest.raises(ValueError, match=re.escape(message)):
        api.further_scale(*change(*inputs), implementation=implementation)
