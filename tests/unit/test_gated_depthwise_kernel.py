"""The kernels of the Mix-FFN, interpreted, against the formula; memory that nobody wrote is NaN there."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import strategies as st
from interpreted_strips import small_strips
from jax.experimental.pallas import mosaic_gpu as plgpu
from sana_jax.kernels.glu_mbconv import api, pallas_gpu, reference

BOUND = {"float32": 1e-5, "bfloat16": 1e-2}


def arrays(batch, height, width, channels, row_padding, dtype="float32"):
    """Value, gate, kernel, bias and a gradient."""
    rng = np.random.default_rng((batch, height, width, channels))
    grids = (batch, height, width, channels), (batch, height - 2 * (1 - row_padding), width, channels)
    value, gate, g = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in (grids[0], *grids))
    kernel, bias = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 3, 2 * channels), 2 * channels)
    )
    return value, gate, kernel, bias, g


def relative_error(found, expected):
    found, expected = np.float64(found), np.float64(expected)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def value_and_gradients(function, *inputs, g, row_padding):
    y, vjp = jax.vjp(functools.partial(function, row_padding=row_padding), *inputs)
    return y, *vjp(g)


def errors(*shape, row_padding, dtype):
    """Relative errors of the TPU's result and of the four gradients."""

    *inputs, g = arrays(*shape, row_padding, dtype)
    ours = functools.partial(api.gated_depthwise, implementation="pallas_tpu")
    with small_strips():
        found = jax.jit(functools.partial(value_and_gradients, ours, row_padding=row_padding))(*inputs, g=g)
    *inputs, g = (x.astype(jnp.float32) for x in (*inputs, g))
    expected = value_and_gradients(reference.gated_depthwise, *inputs, g=g, row_padding=row_padding)
    assert [x.dtype for x in found] == [dtype] * 3 + ["float32"] * 2
    return [relative_error(x, y) for x, y in zip(found, expected, strict=True)]


@pytest.mark.parametrize(("row_padding", "dtype"), [(1, "float32"), (0, "bfloat16")])
def test_value_and_gradients_are_those_of_the_formula(row_padding, dtype):
    # Two and a half strips of four rows, one and a quarter groups of channels.
    assert max(errors(2, 10, 4, 160, row_padding=row_padding, dtype=dtype)) < BOUND[dtype]


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=3, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
def test_any_grid_will_do(data):
    row_padding = data.draw(st.sampled_from([0, 1]))
    height = data.draw(st.integers(2, 9)) + 2 * (1 - row_padding)
    shape = data.draw(st.integers(1, 2)), height, data.draw(st.integers(1, 17)), data.draw(st.integers(128, 140))
    dtype = data.draw(st.sampled_from(list(BOUND)))
    assert max(errors(*shape, row_padding=row_padding, dtype=dtype)) < BOUND[dtype]


@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="JAX interprets a GPU's copies from 0.11 on")
@pytest.mark.parametrize(("shape", "row_padding"), [((2, 5, 5, 136), 1), ((1, 7, 6, 200), 0), ((1, 4, 4, 256), 1)])
def test_the_gpu_kernels_give_value_and_gradients_of_the_formula(monkeypatch, shape, row_padding):
    monkeypatch.setattr(pallas_gpu, "ROWS", 2)  # of tiles that a CPU's compiler has not so much to do for
    monkeypatch.setattr(pallas_gpu, "COLUMNS", 4)
    monkeypatch.setattr(pallas_gpu, "CLAMPED", True)
    *inputs, g = arrays(*shape, row_padding, "bfloat16")  # whole tiles, and tiles that the grid's ends cut
    ours = functools.partial(api.gated_depthwise, implementation="pallas_gpu")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(uninitialized_memory="nan")):
        found = jax.jit(functools.partial(value_and_gradients, ours, row_padding=row_padding))(*inputs, g=g)
    assert [x.dtype for x in found] == ["bfloat16"] * 3 + ["float32"] * 2
    *inputs, g = (x.astype(jnp.float32) for x in (*inputs, g))
    expected = value_and_gradients(reference.gated_depthwise, *inputs, g=g, row_padding=row_padding)
    assert max(relative_error(x, y) for x, y in zip(found, expected, strict=True)) < BOUND["bfloat16"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "its arrays are float32; both must be bfloat16"),
        ({"channels": 12}, "12 channels are not a multiple of 8"),
        ({"height": 2, "row_padding": 0}, "2 rows with row_padding=0 are fewer than the kernel's 3"),
    ],
)
def test_the_gpu_kernel_says_why_it_cannot_run(change, message):
    shape = {"height": 4, "width": 4, "channels": 16, "row_padding": 1, "dtype": "bfloat16"} | change
    size = shape["height"], shape["width"], shape["channels"]
    value = jnp.zeros((1, *size), shape["dtype"])
    kernel, bias = jnp.zeros((3, 3, 2 * size[-1])), jnp.zeros(2 * size[-1])
    with pytest.raises(ValueError, match=f"implementation='pallas_gpu' cannot run: .*{message}"):
        api.gated_depthwise(value, value, kernel, bias, shape["row_padding"], "pallas_gpu")


@pytest.mark.parametrize(
    ("shape", "row_padding", "message"),
    [
        ((1, 4, 4, 64), 1, "64 channels are fewer than 128 lanes"),
        ((1, 1, 4, 128), 1, "the grid is 1x4"),
        ((1, 3, 4, 128), 0, "the grid is 3x4"),
        ((1, 4, 513, 128), 1, "at most 512 positions"),
    ],
)
def test_a_forced_kernel_that_cannot_run_says_why_and_is_not_chosen(shape, row_padding, message):
    *inputs, _ = arrays(*shape, row_padding)
    with pytest.raises(ValueError, match=f"cannot run: .*{message}"):
        api.gated_depthwise(*inputs, row_padding, implementation="pallas_tpu")
    text = jax.jit(functools.partial(api.gated_depthwise, row_padding=row_padding)).trace(*inputs).jaxpr
    assert "pallas_call" not in str(text)


def test_other_convolutions_dtypes_and_names_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users call it
    value, gate, kernel, bias, _ = arrays(1, 4, 4, 128, 1)
    for inputs, message in (
        ((value, gate, jnp.zeros((5, 5, 256)), bias), "the convolution is 5x5"),
        ((value.astype(jnp.float16), gate, kernel, bias), "both must be float32, or both bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            api.gated_depthwise(*inputs, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="implementation='triton' is unknown"):
        api.gated_depthwise(value, gate, kernel, bias, implementation="triton")
    with pytest.raises(ValueError, match="the kernel has 128 channels"):
        api.gated_depthwise(value, gate, kernel[..., :128], bias[:128])
    with pytest.raises(ValueError, match=r"bias is \(128,\) and the kernel has 256 channels"):
        api.gated_depthwise(value, gate, kernel, bias[:128])
