"""Eight-bit products against float64, and a tiny pipeline with a quantised transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from sana_jax.kernels.dense.quantized import quantize, quantized_dense
from tiny_pipeline import tiny_parts

from sana_jax import SanaPipeline
from sana_jax.quantization import KINDS, LAYERS, quantize_transformer
from sana_jax.weights import folder

CHANNELS, FEATURES = 64, 32
each_kind = pytest.mark.parametrize("kind", list(KINDS))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def rounding(rows, kind):
    """How far the codes of these rows may be from them: half a step of 1/127 of the largest, or three bits after the first."""
    largest = np.abs(rows).max(-1, keepdims=True)
    return largest / 127 / 2 + 0 * rows if kind == "int8" else np.maximum(np.abs(rows) / 2**4, largest / 448 / 2**10)


def error_over_bound(y, x, kernel, bias, kind):
    """The largest error against float64 over what the codes of x [N, C] and of the kernel [D, C] allow."""
    x, kernel = np.float64(x), np.float64(kernel)
    x_error, kernel_error = rounding(x, kind), rounding(kernel, kind)
    bound = np.abs(x) @ kernel_error.T + x_error @ (np.abs(kernel) + kernel_error).T
    summation = 1e-5 * (np.abs(x) @ np.abs(kernel).T + np.abs(bias))
    return np.max(np.abs(np.float64(y) - x @ kernel.T - np.float64(bias)) / (bound + summation))


def inputs_with_outliers():
    x = normal(10, CHANNELS).at[3].multiply(1e6)
    kernel = normal(FEATURES, CHANNELS, seed=1).at[5].multiply(1e6)
    return x, kernel, normal(FEATURES, seed=2)


@each_kind
def test_the_error_is_within_what_the_codes_allow(kind):
    x, kernel, bias = inputs_with_outliers()
    y = jax.jit(quantized_dense)(x.reshape(2, 5, -1), *quantize(kernel, KINDS[kind]), bias)
    assert y.shape == (2, 5, FEATURES) and y.dtype == jnp.float32
    assert 0.01 < error_over_bound(y.reshape(10, -1), x, kernel, bias, kind) < 1


@pytest.mark.parametrize("channels", [1, 63, 64, 100, 192])
@each_kind
def test_the_largest_value_has_the_largest_code_wherever_it_stands(channels, kind):
    x = jax.random.uniform(jax.random.key(0), (channels, channels), minval=-1.0) + 3 * jnp.diag(
        (-1.0) ** jnp.arange(channels)
    )
    codes, scale = jax.jit(quantize, static_argnums=1)(x, KINDS[kind])
    largest = 127.0 if kind == "int8" else 448.0
    np.testing.assert_allclose(scale, np.abs(x).max(-1) / largest, rtol=1e-6)
    np.testing.assert_array_equal(np.abs(np.diag(codes).astype(np.float32)), largest)


@each_kind
def test_one_scale_for_all_channels_loses_those_beside_an_outlier(kind):
    x, kernel, bias = inputs_with_outliers()
    codes, scale = quantize(kernel.reshape(1, -1), KINDS[kind])
    y = quantized_dense(x, codes.reshape(kernel.shape), jnp.repeat(scale, FEATURES), bias)
    assert error_over_bound(y, x, kernel, bias, kind) > 1.5


@each_kind
def test_a_token_does_not_see_the_others(kind):
    x, kernel, bias = inputs_with_outliers()
    coded = quantize(kernel, KINDS[kind])
    np.testing.assert_array_equal(quantized_dense(x, *coded, bias)[:3], quantized_dense(x[:3], *coded, bias))


@each_kind
def test_zero_tokens_and_zero_channels_give_zeros(kind):
    coded = quantize(normal(FEATURES, CHANNELS).at[7].set(0), KINDS[kind])
    y = np.asarray(quantized_dense(normal(4, CHANNELS, seed=1).at[2].set(0), *coded))
    assert not y[2].any() and not y[:, 7].any() and np.isfinite(y).all()
    assert np.all(y[:2, :7])


@each_kind
def test_what_is_not_finite_stays_so_in_its_token_alone(kind):
    x = normal(3, CHANNELS).at[0, 0].set(jnp.nan).at[1, 0].set(jnp.inf)
    y = quantized_dense(x, *quantize(normal(FEATURES, CHANNELS), KINDS[kind]))
    assert not np.isfinite(y[:2]).any() and np.isfinite(y[2]).all()


def test_the_largest_values_have_the_largest_codes():
    x = jnp.asarray([[-3.0, 1.0, 3.0]])
    for kind, largest in (("int8", 127), ("fp8", 448)):
        codes, scale = quantize(x, KINDS[kind])
        np.testing.assert_array_equal(codes[0, ::2].astype(jnp.float32), [-largest, largest])
        np.testing.assert_allclose(scale, [3 / largest], rtol=1e-6)


@pytest.mark.parametrize(("kind", "types"), [("int8", ("i8", "i32")), ("fp8", ("f8E4M3FN", "f32"))])
def test_two_matrices_of_codes_are_multiplied_with_the_summed_axes_last(kind, types):
    """The form that XLA for GPUs makes an eight-bit cuBLASLt call of."""
    narrow, wide = types
    coded = quantize(normal(FEATURES, CHANNELS), KINDS[kind])
    text = jax.jit(quantized_dense).lower(normal(2, 5, CHANNELS).astype(jnp.bfloat16), *coded).as_text()
    (product,) = [line for line in text.splitlines() if "dot_general" in line]
    assert "contracting_dims = [1] x [1]" in product
    assert f"(tensor<10x64x{narrow}>, tensor<32x64x{narrow}>) -> tensor<10x32x{wide}>" in product


def test_a_quantised_layer_refuses_to_be_differentiated():
    coded = quantize(normal(FEATURES, CHANNELS), jnp.int8)
    with pytest.raises(NotImplementedError, match="train with float parameters"):
        jax.grad(lambda x: quantized_dense(x, *coded).sum())(normal(4, CHANNELS))


@each_kind
def test_the_blocks_dense_layers_are_coded_per_layer_and_channel_and_all_else_is_the_same_array(kind):
    params = tiny_parts().transformer[1]
    before = traverse_util.flatten_dict(params)
    after = traverse_util.flatten_dict(quantize_transformer(params, kind))
    kernels = {(*layer, "kernel") for layer in LAYERS}
    assert before.keys() - after.keys() == kernels
    assert after.keys() - before.keys() == {(*layer, name) for layer in LAYERS for name in ("codes", "scale")}
    assert all(after[path] is before[path] for path in before.keys() - kernels)
    for layer in LAYERS:
        kernel = np.moveaxis(before[*layer, "kernel"], 1, -1)
        codes, scale = after[*layer, "codes"], np.asarray(after[*layer, "scale"])
        assert codes.dtype == KINDS[kind] and scale.shape == kernel.shape[:-1]
        error = np.abs(np.float64(codes) * scale[..., None] - kernel)
        assert np.all(error <= 1.001 * rounding(kernel, kind))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    folder.save_pipeline(path, **tiny_parts()._asdict())
    return path


@pytest.fixture(scope="module")
def plain():
    return SanaPipeline(tiny_parts())("a red apple", output_type="latent")


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.02), ("fp8", 0.06)])
def test_a_quantised_pipeline_draws_nearly_the_same(model, plain, kind, tolerance):
    pipe = SanaPipeline.from_pretrained(model, quantization=kind)
    latents = pipe("a red apple", output_type="latent")
    error = np.linalg.norm(latents - plain) / np.linalg.norm(plain)
    assert 1e-4 < error < tolerance
    with pytest.raises(ValueError, match="a quantised transformer is not saved"):
        pipe.save_pretrained(model / "again")


def test_an_unknown_quantisation_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="quantization='int4' is not one of int8, fp8"):
        SanaPipeline.from_pretrained("no folder", quantization="int4")


def test_parameters_are_not_quantised_twice():
    with pytest.raises(ValueError, match="quantised already"):
        quantize_transformer(quantize_transformer(tiny_parts().transformer[1], "int8"), "fp8")
