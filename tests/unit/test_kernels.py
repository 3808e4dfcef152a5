"""Every kernel against its reference and against NumPy, values and derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sana_jax.kernels.dense import api as dense_api
from sana_jax.kernels.depthwise_conv import api as conv_api
from sana_jax.kernels.depthwise_conv import reference as conv_reference
from sana_jax.kernels.glu_mbconv import api as gated_api
from sana_jax.kernels.glu_mbconv import reference as gated_reference
from sana_jax.kernels.linear_attention import api as attention_api
from sana_jax.kernels.linear_attention import reference as attention_reference
from sana_jax.kernels.softmax_attention import api as softmax_api
from sana_jax.kernels.softmax_attention import blocks as softmax_blocks
from sana_jax.kernels.softmax_attention import cudnn as softmax_cudnn
from sana_jax.kernels.softmax_attention import reference as softmax_reference


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def relative_error(value, reference):
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(value - reference) / np.linalg.norm(reference)


def assert_same_derivatives(f, g, *arguments, tolerance=1e-5):
    """Both functions have the same value and the same gradients of a random projection of it."""
    weights = normal(*g(*arguments).shape, seed=9)

    def gradients(h):
        def scalar(*x):
            y = h(*x).astype(jnp.float32)
            return (weights * y).sum(), y

        return jax.jit(jax.value_and_grad(scalar, argnums=tuple(range(len(arguments))), has_aux=True))(*arguments)

    (_, y), ours = gradients(f)
    (_, reference), theirs = gradients(g)
    assert relative_error(y, reference) < tolerance
    for mine, other, argument in zip(ours, theirs, arguments, strict=True):
        assert mine.dtype == argument.dtype
        assert relative_error(mine, other) < tolerance


def test_a_dense_layer_is_rounded_once():
    arrays = normal(64, 16), normal(16, 32, seed=1), normal(32, seed=2)
    x, kernel, bias = (a.astype(jnp.bfloat16) for a in arrays)
    exact = np.float64(x) @ np.float64(kernel) + np.float64(bias)
    half_a_unit = np.exp2(np.floor(np.log2(np.abs(exact))) - 8)
    error = np.abs(np.float64(jax.jit(dense_api.dense)(x, kernel, bias)) - exact)
    assert np.all(error <= 1.01 * half_a_unit + 1e-5)


def test_linear_attention_is_the_quotient_of_its_sums():
    inputs = [normal(2, 5, 6, seed=s) for s in range(3)]
    q, k, v = map(np.asarray, inputs)
    expected = np.zeros((2, 5, 6))
    for b in range(2):
        for head in (slice(0, 3), slice(3, 6)):
            for n in range(5):
                weights = np.maximum(k[b, :, head], 0) @ np.maximum(q[b, n, head], 0)
                if weights.sum():
                    expected[b, n, head] = weights @ v[b, :, head] / (weights.sum() + 1e-15)
    assert relative_error(attention_api.linear_attention(*inputs, head_dim=3), expected) < 1e-5


@pytest.mark.parametrize("tokens", [2, 7, 64])
def test_linear_attention_has_the_value_and_gradients_of_its_quadratic_form(tokens):
    # Keys well above zero: next to a vanishing normaliser no two orders of summation agree.
    q, k, v = (normal(2, tokens, 32, seed=s) + 1 for s in range(3))
    assert_same_derivatives(
        functools.partial(attention_api.linear_attention, head_dim=16, eps=1e-8),
        functools.partial(attention_reference.linear_attention, head_dim=16, eps=1e-8),
        q,
        k,
        v,
    )


def test_linear_attention_states_of_token_shards_add_up():
    k, v = normal(2, 8, 16, seed=1), normal(2, 8, 16, seed=2)
    whole = attention_api.linear_attention_state(k, v, head_dim=8)
    parts = [attention_api.linear_attention_state(k[:, i : i + 4], v[:, i : i + 4], head_dim=8) for i in (0, 4)]
    for total, first, second in zip(whole, *parts, strict=True):
        np.testing.assert_allclose(total, first + second, rtol=1e-5, atol=1e-5)


def test_a_query_without_positive_channel_gives_zero():
    q = -jnp.ones((1, 2, 8))
    assert not np.asarray(attention_api.linear_attention(q, normal(1, 2, 8), normal(1, 2, 8), head_dim=8)).any()


def test_linear_attention_names_the_head_dimension_that_does_not_divide():
    with pytest.raises(ValueError, match="head_dim=5 does not divide the 8 channels"):
        attention_api.linear_attention(normal(1, 2, 8), normal(1, 2, 8), normal(1, 2, 8), head_dim=5)


@pytest.mark.parametrize("implementation", ["whole", "blocks"])
def test_softmax_attention_is_a_mean_of_the_values_that_are_seen(implementation):
    q, k, v = normal(2, 5, 6), normal(2, 7, 6, seed=1), normal(2, 7, 6, seed=2)
    mask = np.arange(7) < np.array([[4], [0]])  # the second picture has no text at all: all of its padding is seen
    expected = np.zeros(q.shape)
    for b in range(2):
        for head in (slice(0, 3), slice(3, 6)):
            queries, keys, values = (np.float64(x)[b, :, head] for x in (q, k, v))
            weights = np.exp(queries @ keys.T / np.sqrt(3)) * (mask[b] if mask[b].any() else 1)
            expected[b, :, head] = weights @ values / weights.sum(-1, keepdims=True)
    y = softmax_api.softmax_attention(q, k, v, jnp.asarray(mask), heads=2, implementation=implementation)
    assert relative_error(y[0], expected[0]) < 1e-6
    assert relative_error(y[1], expected[1]) < 1e-3  # beside -10000 float32 logits have three digits left


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("tokens", "keys", "heads"), [(7, 5, 3), (16, 16, 1), (1, 3, 4), (12, 40, 2), (2, 1100, 1)])
@pytest.mark.parametrize("logits", [1, 100, 2**19])
def test_blocks_of_softmax_attention_have_the_value_and_gradients_of_the_whole(
    monkeypatch, logits, tokens, keys, heads, dtype
):
    """`logits` of a block: of one query of one head, of a few, of all. The second picture has no text at all."""
    monkeypatch.setattr(softmax_blocks, "LOGITS", logits)
    shapes = (2, tokens, 8 * heads), (2, keys, 8 * heads), (2, keys, 8 * heads)
    arrays = [2 * normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    mask = jnp.asarray(np.arange(keys) < np.array([[max(1, keys - 2)], [0]]))
    for seen in (mask, None):
        in_blocks, whole = (
            functools.partial(softmax_api.softmax_attention, mask=seen, heads=heads, implementation=name)
            for name in ("blocks", "whole")
        )
        assert_same_derivatives(in_blocks, whole, *arrays, tolerance=1e-5 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize(("tokens", "keys"), [(7, 5), (7, 6), (8, 5), (8, 6)])
def test_what_cudnn_is_given_is_even_and_gives_the_whole(monkeypatch, tokens, keys):
    attention, shapes = jax.nn.dot_product_attention, []

    def even(q, k, v, *, bias, implementation):
        assert implementation == "cudnn"
        shapes.append((q.shape[1], k.shape[1]))
        return attention(q, k, v, bias=bias, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", even)
    arrays = [normal(2, length, 16, seed=seed) for seed, length in enumerate((tokens, keys, keys))]
    mask = jnp.asarray(np.arange(keys) < np.array([[keys - 2], [0]]))
    for seen in (mask, None):
        padded, whole = (
            functools.partial(form.softmax_attention, mask=seen, heads=2) for form in (softmax_cudnn, softmax_reference)
        )
        assert_same_derivatives(padded, whole, *arrays, tolerance=1e-5)
    assert {size % 2 for shape in shapes for size in shape} == {0}


def test_softmax_attention_of_large_logits_is_that_of_the_largest():
    q, k, v = 1e4 * normal(1, 3, 4), normal(1, 5, 4), normal(1, 5, 4, seed=1)
    expected = np.asarray(v)[0, np.argmax(np.asarray(q)[0] @ np.asarray(k)[0].T, axis=-1)]
    for implementation in ("whole", "blocks"):
        y = softmax_api.softmax_attention(q, k, v, heads=1, implementation=implementation)
        np.testing.assert_allclose(y[0], expected, rtol=1e-6)


def test_softmax_attention_refuses_what_it_cannot_do():
    x = normal(1, 2, 8)
    with pytest.raises(ValueError, match="heads=3 does not divide the 8 channels"):
        softmax_api.softmax_attention(x, x, x, heads=3)
    with pytest.raises(ValueError, match="implementation='flash' is unknown; use None, whole, blocks, cudnn"):
        softmax_api.softmax_attention(x, x, x, heads=2, implementation="flash")
    for shape, dtype, why in [
        ((1, 2, 16), jnp.float32, "its arrays are float32"),
        ((1, 2, 24), jnp.bfloat16, "a head has 12 channels"),
        ((1, 2, 16), jnp.bfloat16, "this process has no NVIDIA GPU"),
    ]:
        x = jnp.ones(shape, dtype)
        with pytest.raises(ValueError, match=f"implementation='cudnn' cannot run: {why}"):
            softmax_api.softmax_attention(x, x, x, heads=2, implementation="cudnn")


@pytest.mark.parametrize("grid", [(4, 4), (1, 1), (2, 5), (8, 8), (5, 17)])
@pytest.mark.parametrize("size", [3, 5])
def test_depthwise_convolution_has_the_value_and_gradients_of_the_grouped_convolution(size, grid):
    assert_same_derivatives(
        conv_api.depthwise_conv,
        functools.partial(conv_reference.depthwise_conv, row_padding=size // 2),
        normal(2, *grid, 6),
        normal(size, size, 6, seed=1),
    )


@pytest.mark.parametrize(("size", "row_padding"), [(3, 0), (5, 0), (5, 1), (3, 2)])
def test_rows_that_x_brings_along_need_no_padding(size, row_padding):
    x, kernel = normal(2, 9, 5, 6), normal(size, size, 6, seed=1)
    ours = functools.partial(conv_api.depthwise_conv, row_padding=row_padding)
    theirs = functools.partial(conv_reference.depthwise_conv, row_padding=row_padding)
    assert_same_derivatives(ours, theirs, x, kernel)
    if row_padding == 0:
        whole, reach = conv_api.depthwise_conv(x, kernel), size // 2
        np.testing.assert_allclose(ours(x, kernel), whole[:, reach:-reach], rtol=1e-5, atol=1e-5)


def test_too_few_rows_are_an_error_with_the_number_that_would_do():
    with pytest.raises(
        ValueError, match="2 rows, which with row_padding=0 are fewer than the kernel's 3; give at least 3"
    ):
        conv_api.depthwise_conv(normal(1, 2, 4, 2), normal(3, 3, 2), row_padding=0)


def test_depthwise_convolution_sums_shifted_pixels():
    inputs = normal(1, 3, 4, 2), normal(3, 3, 2, seed=1)
    x, kernel = map(np.asarray, inputs)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(padded[:, a : a + 3, b : b + 4] * kernel[a, b] for a in range(3) for b in range(3))
    np.testing.assert_allclose(conv_api.depthwise_conv(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_depthwise_convolution_refuses_to_crop_and_rows_of_nothing_but_padding():
    for rows in (-1, 3):
        with pytest.raises(ValueError, match=f"row_padding={rows} counts rows of zeros .* use 0 to 2"):
            conv_api.depthwise_conv(normal(1, 4, 4, 2), normal(3, 3, 2), row_padding=rows)


def test_depthwise_convolution_refuses_even_kernels():
    with pytest.raises(ValueError, match="kernel is 2x3; both sides must be odd"):
        conv_api.depthwise_conv(normal(1, 4, 4, 2), normal(2, 3, 2))


def test_depthwise_convolution_refuses_an_unknown_implementation():
    with pytest.raises(ValueError, match="implementation='cudnn' is unknown; use None, grouped, shifted"):
        conv_api.depthwise_conv(normal(1, 4, 4, 2), normal(3, 3, 2), implementation="cudnn")


@pytest.mark.parametrize(("grid", "row_padding"), [((4, 4), 1), ((3, 6), 1), ((5, 4), 0)])
def test_gated_depthwise_has_the_value_and_gradients_of_its_formula(grid, row_padding):
    halves = normal(2, *grid, 6), normal(2, *grid, 6, seed=3)
    arguments = *halves, normal(3, 3, 12, seed=1), normal(12, seed=2)
    ours, theirs = (
        functools.partial(f, row_padding=row_padding)
        for f in (gated_api.gated_depthwise, gated_reference.gated_depthwise)
    )
    assert_same_derivatives(ours, theirs, *arguments)


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (2, 2, 3, 5), (13, 5)])
def test_dense_has_the_value_and_gradients_of_a_matrix_product(shape):
    assert_same_derivatives(
        dense_api.dense,
        lambda x, kernel, bias: x @ kernel + bias,
        normal(*shape),
        normal(5, 4, seed=1),
        normal(4, seed=2),
    )


def test_dense_layers_of_one_input_are_the_same_in_the_form_of_every_backend():
    x, kernel, bias = normal(2, 3, 5), normal(5, 3, 4, seed=1), normal(3, 4, seed=2)
    g = tuple(normal(2, 3, 4, seed=part) for part in range(3, 6))
    forms = {}
    for form in ("_apart", "_together"):
        forward, backward = getattr(dense_api, form), getattr(dense_api, f"{form}_backward")
        forms[form] = jax.jit(forward)(x, kernel, bias), jax.jit(backward)(x, kernel, bias, g)
    for ours, other in zip(*map(jax.tree.leaves, forms.values()), strict=True):
        assert relative_error(ours, other) < 1e-5
    assert_same_derivatives(
        lambda *inputs: jnp.stack(dense_api.dense_parts(*inputs), axis=-2),
        lambda x, kernel, bias: jnp.einsum("bnc,cpd->bnpd", x, kernel) + bias,
        x,
        kernel,
        bias,
    )


def test_dense_in_bfloat16_stays_within_its_rounding():
    x, kernel, bias = normal(64, 32, dtype=jnp.bfloat16), normal(32, 16, seed=1), normal(16, seed=2)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
    y = dense_api.dense(x, kernel, bias)
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, exact) < 1e-2


@pytest.mark.parametrize("with_bias", [False, True])
def test_dense_has_products_with_float32_results_on_cpus(with_bias):
    bias = normal(16, seed=2) if with_bias else None

    def both(x, kernel):
        y, vjp = jax.vjp(functools.partial(dense_api.dense, bias=bias), x, kernel)
        return y, vjp(y)

    arrays = normal(2, 64, 32, dtype=jnp.bfloat16), normal(32, 16, dtype=jnp.bfloat16)
    program = jax.jit(both).trace(*arrays).lower(lowering_platforms=("cpu",)).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 3 and all("xbf16>) -> " in line and line.endswith("xf32>") for line in products)


def test_sum_positions_sums_all_axes_but_the_last():
    x = normal(2, 3, 4, 5)
    np.testing.assert_allclose(dense_api.sum_positions(x), np.asarray(x).sum((0, 1, 2)), rtol=1e-5, atol=1e-5)
