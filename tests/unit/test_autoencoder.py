"""DC-AE: its blocks against NumPy restatements, configuration errors, sizes and configuration files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sana_jax.models import presets
from sana_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sana_jax.models.autoencoder_blocks import (
    DownBlock,
    EfficientViTBlock,
    FrozenBatchNorm,
    LiteMLA,
    ResBlock,
    RMSNorm2d,
    UpBlock,
    pixel_shuffle,
    pixel_unshuffle,
)
from sana_jax.models.autoencoder_conv import conv2d, conv2d_lax, conv2d_products, conv2d_products_vjp
from sana_jax.parallel import autoencoder as parallel
from sana_jax.weights.autoencoder import config_from_json, config_to_json

TINY = AutoencoderConfig(
    latent_channels=4,
    attention_head_dim=8,
    encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    encoder_block_out_channels=(8, 8, 16),
    decoder_block_out_channels=(8, 8, 16),
    encoder_layers_per_block=(0, 1, 1),
    decoder_layers_per_block=(0, 1, 1),
    encoder_qkv_multiscales=((), (), ()),
    decoder_qkv_multiscales=((), (), (5,)),
)

FLOAT32 = jnp.dtype("float32")
# One block of each side, of the kind that has most parts.
ONE_BLOCK = AutoencoderConfig(
    latent_channels=4,
    attention_head_dim=8,
    encoder_block_types="EfficientViTBlock",
    decoder_block_types="EfficientViTBlock",
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    encoder_layers_per_block=(0, 1),
    decoder_layers_per_block=(0, 1),
    encoder_qkv_multiscales=((), (5,)),
    decoder_qkv_multiscales=((), ()),
)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def random_params(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda s: jnp.asarray(rng.uniform(-1, 1, s.shape) / max(1, s.shape[0]), jnp.float32), shapes)


@functools.cache
def model_params(config=TINY):
    return random_params(Autoencoder(config), jnp.zeros((1, 8, 8, 3)))


@functools.cache
def compiled(config, method):
    return jax.jit(functools.partial(Autoencoder(config).apply, method=method))


@functools.cache
def loss_and_gradient(config):
    def loss(params, images):
        return jnp.mean((Autoencoder(config).apply({"params": params}, images) - images) ** 2)

    return jax.jit(jax.value_and_grad(loss))


def numpy_convolution(x, kernel, stride=1):
    """Sums written out: zero padding of k // 2 on every side, then every stride-th position."""
    k, height, width = kernel.shape[0], x.shape[1], x.shape[2]
    padded = np.zeros((x.shape[0], height + k - 1, width + k - 1, x.shape[3]))
    padded[:, k // 2 : k // 2 + height, k // 2 : k // 2 + width] = x
    out = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            out[:, i, j] = np.einsum("bklc,klcd->bd", padded[:, i : i + k, j : j + k], kernel)
    return out[:, ::stride, ::stride]


# Convolution


@pytest.mark.parametrize("size, kernel_size, stride", [((4, 6), 3, 1), ((4, 6), 3, 2), ((9, 8), 3, 1), ((3, 2), 5, 1)])
def test_convolution_is_the_padded_sum(size, kernel_size, stride):
    x, kernel = normal(2, *size, 5), normal(kernel_size, kernel_size, 5, 3, seed=1)
    bias = normal(3, seed=2)
    np.testing.assert_allclose(conv2d(x, kernel, bias, stride), numpy_convolution(x, kernel, stride) + bias, atol=1e-4)


@pytest.mark.parametrize("side", [4, 32])
def test_convolution_and_bias_are_rounded_once(side):
    arrays = normal(1, side, side, 8), normal(3, 3, 8, 4, seed=1), normal(4, seed=2)
    x, kernel, bias = (a.astype(jnp.bfloat16) for a in arrays)
    exact = numpy_convolution(*(np.float64(a) for a in (x, kernel)), 1) + np.float64(bias)
    got = jax.jit(conv2d)(x, kernel, bias)
    half_a_unit = np.exp2(np.floor(np.log2(np.abs(exact))) - 8)
    assert np.all(np.abs(np.float64(got) - exact) <= 1.01 * half_a_unit + 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("products_for_input", [False, True])
def test_gradients_by_products_are_those_of_the_convolution(dtype, tolerance, products_for_input):
    arrays = normal(2, 5, 4, 3), normal(3, 3, 3, 7, seed=1), normal(2, 5, 4, 7, seed=2)
    x, kernel, g = (a.astype(dtype) for a in arrays)
    mine = conv2d_products_vjp(x, kernel, g, products_for_input=products_for_input)
    true = jax.vjp(conv2d_lax, *(a.astype(jnp.float32) for a in (x, kernel)))[1](g.astype(jnp.float32))
    for ours, theirs in zip(mine, true, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("side, stride", [(4, 1), (20, 1), (6, 2)])
def test_gradients_of_a_convolution_with_bias_are_those_of_xlas(side, stride):
    x, kernel, bias = normal(2, side, side, 3), normal(3, 3, 3, 5, seed=1), normal(5, seed=2)
    g = normal(2, side // stride, side // stride, 5, seed=3)
    ours = jax.vjp(lambda *a: conv2d(*a, stride), x, kernel, bias)[1](g)
    true = jax.vjp(lambda x, w, b: conv2d_lax(x, w, stride) + b, x, kernel, bias)[1](g)
    for mine, theirs in zip(ours, true, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max())


def test_products_and_convolution_agree_in_bfloat16():
    x, kernel = normal(1, 4, 4, 32).astype(jnp.bfloat16), normal(3, 3, 32, 8, seed=1).astype(jnp.bfloat16)
    true = conv2d_lax(x.astype(jnp.float32), kernel.astype(jnp.float32))
    got = conv2d_products(x, kernel)
    np.testing.assert_allclose(got, true, atol=1e-6 * np.abs(true).max())


@pytest.mark.parametrize(
    "platform, side, dtype, by_convolution",
    [
        ("cpu", 16, "bfloat16", False),
        ("cpu", 32, "bfloat16", True),
        ("cpu", 8, "float32", False),
        ("cpu", 16, "float32", True),
        ("tpu", 4, "bfloat16", True),
        ("cuda", 4, "bfloat16", True),
    ],
)
def test_only_coarse_grids_on_cpu_are_convolved_by_products(platform, side, dtype, by_convolution):
    x, kernel = jax.ShapeDtypeStruct((1, side, side, 4), dtype), jax.ShapeDtypeStruct((3, 3, 4, 4), dtype)
    text = jax.jit(conv2d).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in text) == by_convolution


# Blocks


def test_pixel_unshuffle_has_pytorchs_channel_order():
    x = np.asarray(normal(1, 4, 6, 3))
    got = pixel_unshuffle(jnp.asarray(x))
    for c in range(3):
        for i in range(2):
            for j in range(2):
                np.testing.assert_array_equal(got[..., 4 * c + 2 * i + j], x[:, i::2, j::2, c])
    np.testing.assert_array_equal(pixel_shuffle(got), x)


@pytest.mark.parametrize("unshuffle", [True, False])
def test_the_shortcut_down_averages_consecutive_channels_of_the_unshuffled_input(unshuffle):
    x, module = normal(1, 4, 4, 4), DownBlock(8, unshuffle, dtype=FLOAT32)
    params = jax.tree.map(jnp.zeros_like, random_params(module, x))
    stacked = np.stack([x[:, i::2, j::2] for i in range(2) for j in range(2)], -1).reshape(1, 2, 2, 16)
    expected = np.stack([(stacked[..., 2 * c] + stacked[..., 2 * c + 1]) / 2 for c in range(8)], -1)
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-6)


@pytest.mark.parametrize("interpolate", [True, False])
def test_the_shortcut_up_repeats_each_channel_in_a_row(interpolate):
    x, module = normal(1, 2, 2, 4), UpBlock(2, interpolate, dtype=FLOAT32)
    params = jax.tree.map(jnp.zeros_like, random_params(module, x))
    expected = np.zeros((1, 4, 4, 2))
    for c in range(2):
        for i in range(2):
            for j in range(2):  # channel 4c + 2i + j of the input repeated twice is its channel 2c + i
                expected[:, i::2, j::2, c] = x[..., 2 * c + i]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-6)


def test_interpolation_up_is_nearest_then_convolution():
    x, module = normal(1, 2, 3, 4), UpBlock(4, interpolate=True, shortcut=False, dtype=FLOAT32)
    params = random_params(module, x)
    enlarged = np.asarray(x).repeat(2, axis=1).repeat(2, axis=2)
    expected = numpy_convolution(enlarged, params["conv"]["kernel"]) + params["conv"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)


def test_rms_norm_has_scale_and_bias_over_channels():
    x = normal(2, 2, 3, 6)
    params = {"scale": normal(6, seed=1), "bias": normal(6, seed=2)}
    rms = np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-5)
    expected = x / rms * params["scale"] + params["bias"]
    np.testing.assert_allclose(RMSNorm2d(dtype=FLOAT32).apply({"params": params}, x), expected, atol=1e-5)


def test_batch_norm_uses_its_statistics_and_gives_them_no_gradient():
    x = normal(2, 2, 3, 6)
    params = {name: normal(6, seed=i) for i, name in enumerate(("scale", "bias", "mean"))}
    params["var"] = jnp.arange(6) + 0.5
    expected = (x - params["mean"]) / np.sqrt(params["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(FrozenBatchNorm(dtype=FLOAT32).apply({"params": params}, x), expected, atol=1e-5)
    gradient = jax.grad(lambda p: jnp.sum(FrozenBatchNorm(dtype=FLOAT32).apply({"params": p}, x) ** 2))(params)
    assert not np.any(gradient["mean"]) and not np.any(gradient["var"])
    assert np.all(gradient["scale"]) and np.all(gradient["bias"])


def test_attention_heads_are_consecutive_groups_of_three_times_the_head_dimension():
    d, x = 4, normal(1, 2, 3, 8)
    module = LiteMLA(head_dim=d, scales=(3,), dtype=FLOAT32)
    params = random_params(module, x)
    qkv = np.einsum("bhwc,cd->bhwd", x, params["qkv"]["kernel"])
    depth = params["scale_0"]["depth"]
    # A depthwise convolution is a dense one whose kernel is diagonal in the channels.
    scaled = numpy_convolution(qkv, np.einsum("klc,cd->klcd", depth, np.eye(24)))
    groups = [scaled[..., d * i : d * (i + 1)] @ np.asarray(params["scale_0"]["group"][i]) for i in range(6)]
    fused = np.concatenate([qkv, *groups], -1).reshape(6, 48)
    heads = []
    for start in range(0, 48, 3 * d):
        q, k, v = (fused[:, start + i * d : start + (i + 1) * d] for i in range(3))
        weights = np.maximum(q, 0) @ np.maximum(k, 0).T
        heads.append(weights @ v / (weights.sum(1, keepdims=True) + 1e-15))
    out = np.concatenate(heads, -1) @ np.asarray(params["out"]["kernel"])
    out = out / np.sqrt(np.mean(out**2, -1, keepdims=True) + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x).reshape(6, 8), out, atol=1e-4)


# The whole


def test_encode_and_decode_change_the_grid_by_the_factor():
    def shape_of(method, *shape):
        apply = functools.partial(Autoencoder(TINY).apply, method=method)
        return jax.eval_shape(apply, {"params": model_params()}, jax.ShapeDtypeStruct(shape, jnp.float32)).shape

    assert TINY.downsample_factor == 4
    assert shape_of("encode", 2, 12, 8, 3) == (2, 3, 2, 4)
    assert shape_of("decode", 2, 3, 2, 4) == (2, 12, 8, 3)


def test_a_picture_that_the_factor_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="picture 10x8.*multiples of 4.*8x8"):
        Autoencoder(TINY).apply({"params": model_params()}, jnp.zeros((1, 10, 8, 3)), method="encode")


@pytest.mark.parametrize(("method", "shape"), [("encode", (6, 8, 8, 3)), ("decode", (6, 2, 2, 4))])
@pytest.mark.parametrize(("at_once", "loops"), [(64, 1), (128, 1), (10**6, 0)])
def test_a_few_pictures_at_a_time_keep_their_order(monkeypatch, at_once, loops, method, shape):
    monkeypatch.setattr(parallel, "PIXELS_AT_ONCE", at_once)
    x, params = normal(*shape), model_params()
    run = jax.jit(functools.partial(parallel.apply_in_parts, Autoencoder(TINY), method=method))
    assert str(jax.make_jaxpr(run)(params, x)).count("scan[") == loops
    np.testing.assert_allclose(run(params, x), compiled(TINY, method)({"params": params}, x), atol=1e-5)


def test_call_is_decode_of_encode():
    images, variables = normal(2, 8, 8, 3), {"params": model_params()}
    latents = compiled(TINY, "encode")(variables, images)
    expected = compiled(TINY, "decode")(variables, latents)
    np.testing.assert_allclose(compiled(TINY, "__call__")(variables, images), expected, atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "attention+feed_forward"])
def test_remat_leaves_the_gradient_as_it_is(remat):
    images, params = normal(2, 8, 8, 3), model_params(ONE_BLOCK)
    loss, gradient = loss_and_gradient(ONE_BLOCK)(params, images)
    other_loss, other = loss_and_gradient(dataclasses.replace(ONE_BLOCK, remat=remat))(params, images)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, other)


def test_every_parameter_has_a_finite_gradient_that_is_not_zero():
    _, gradient = loss_and_gradient(TINY)(model_params(), normal(2, 8, 8, 3))
    for path, value in traverse_util.flatten_dict(gradient, sep="/").items():
        assert np.all(np.isfinite(value)) and np.any(value), path


def test_bfloat16_computes_close_to_float32_and_returns_float32():
    images, variables = normal(2, 8, 8, 3), {"params": model_params()}
    true = compiled(TINY, "__call__")(variables, images)
    got = compiled(dataclasses.replace(TINY, dtype="bfloat16"), "__call__")(variables, images)
    assert got.dtype == jnp.float32
    assert np.abs(got - true).max() < 0.05 * np.ptp(true)


@pytest.mark.parametrize(
    "preset, factor, parameters",
    [
        ("dc_ae_f32c32_sana_1_1", 32, 312_250_275),
        ("dc_ae_lite_f32c32_sana_1_1", 32, 421_181_228),
        ("dc_ae_f32c32_in_1_0", 32, 323_356_460),
        ("dc_ae_f64c128_in_1_0", 64, 676_896_140),
        ("dc_ae_f128c512_in_1_0", 128, 1_120_682_252),
    ],
)
def test_public_sizes(preset, factor, parameters):
    config = getattr(presets, preset)()
    images = jax.ShapeDtypeStruct((1, factor, factor, 3), jnp.float32)
    shapes = jax.eval_shape(Autoencoder(config).init, jax.random.key(0), images)["params"]
    flat = traverse_util.flatten_dict(shapes, sep="/")
    trained = {path: s for path, s in flat.items() if not path.endswith(("/mean", "/var"))}  # statistics do not count
    assert config.downsample_factor == factor
    assert sum(s.size for s in trained.values()) == parameters


# Configuration


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(decoder_block_out_channels=(8, 16)), "decoder_block_out_channels has 2 entries.*has 3"),
        (dict(encoder_layers_per_block=(1, 0, 1)), "encoder stage 1 has 0 blocks"),
        (dict(attention_head_dim=12), "encoder stage 2 has width 16.*attention_head_dim=12; use 12"),
        (dict(encoder_block_out_channels=(8, 6, 16)), "encoder stage 1 has width 6: pixel_unshuffle"),
        (dict(encoder_block_out_channels=(8, 8, 48)), "encoder stage 2 has width 48, the stage before 8"),
        (dict(latent_channels=0), "latent_channels=0 must be at least 1"),
        (dict(attention_head_dim=-8), "attention_head_dim=-8 must be at least 1"),
        (dict(scaling_factor=0.0), "scaling_factor=0.0 must be above 0"),
        (dict(encoder_block_out_channels=(8, 0, 16)), "encoder_block_out_channels=.8, 0, 16. must be at least 1"),
        (dict(decoder_layers_per_block=(1, -1, 1)), "decoder_layers_per_block=.1, -1, 1. must be at least 0"),
        (dict(encoder_qkv_multiscales=((), (), (4,))), "encoder_qkv_multiscales=.* must have odd kernel sizes"),
        (dict(latent_channels=5), "encoder width 16.*latent_channels=5"),
        (dict(decoder_act_fns="gelu"), "decoder_act_fns has 'gelu', which is not one of relu, silu"),
        (dict(encoder_block_types=("ResBlock", "Res", "ResBlock")), "encoder_block_types has 'Res'"),
        (dict(remat="some"), "remat='some' is unknown"),
    ],
)
def test_a_configuration_no_model_can_have_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_one_name_holds_for_every_stage():
    config = AutoencoderConfig(decoder_norm_types="batch_norm")
    assert config.decoder_norm_types == ("batch_norm",) * 6
    assert config.encoder_block_types == ("ResBlock",) * 6


@pytest.mark.parametrize("preset", ["dc_ae_f32c32_sana_1_1", "dc_ae_lite_f32c32_sana_1_1", "dc_ae_f64c128_in_1_0"])
def test_config_json_gives_the_configuration_back(preset):
    config = getattr(presets, preset)()
    assert config_from_json(config_to_json(config)) == config


def test_public_files_call_the_strided_convolution_conv_in_any_case():
    values = config_to_json(presets.dc_ae_f32c32_sana_1_1())
    values |= {"downsample_block_type": "Conv", "_diffusers_version": "0.32"}
    assert config_from_json(values) == presets.dc_ae_f32c32_sana_1_1()


def test_an_unknown_key_of_config_json_is_refused():
    with pytest.raises(ValueError, match="unknown keys: 'encoder_levels'"):
        config_from_json(config_to_json(TINY) | {"encoder_levels": 3})


def test_the_encoders_last_shortcut_adds_averaged_channels():
    images, without = normal(1, 8, 8, 3), dataclasses.replace(TINY, encoder_out_shortcut=False)
    found, plain = (compiled(c, "encode")({"params": model_params()}, images) for c in (TINY, without))
    assert np.abs(found - plain).max() > 1e-2


@pytest.mark.parametrize(
    "block",
    [
        ResBlock(dtype=FLOAT32),
        ResBlock("batch_norm", dtype=FLOAT32),
        EfficientViTBlock(head_dim=8, scales=(5,), dtype=FLOAT32),
    ],
    ids=["rms_norm", "batch_norm", "efficientvit"],
)
def test_an_untrained_block_passes_its_input_on(block):
    x = normal(1, 4, 4, 16)
    found, _ = jax.jit(lambda key: block.init_with_output(key, x))(jax.random.key(0))
    np.testing.assert_array_equal(found, x)
