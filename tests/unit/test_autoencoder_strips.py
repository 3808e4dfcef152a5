"""DC-AE in strips against the plain call."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipeline import tiny_parts

from sana_jax import SanaPipeline
from sana_jax.models import autoencoder_strips, presets
from sana_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sana_jax.models.autoencoder_blocks import LiteMLAState
from sana_jax.models.autoencoder_strips import choose_strips, decode_in_strips, encode_in_strips
from sana_jax.sampling import program

# The two families of public models: full resolution has blocks (sana), or none (in, mix).
SANA = AutoencoderConfig(
    latent_channels=4,
    attention_head_dim=4,
    encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    encoder_block_out_channels=(4, 4, 8, 8),
    decoder_block_out_channels=(4, 4, 8, 8),
    encoder_layers_per_block=(1, 2, 1, 1),
    decoder_layers_per_block=(2, 1, 1, 1),
    encoder_qkv_multiscales=((), (), (5,), (5,)),
    decoder_qkv_multiscales=((), (), (5,), (5,)),
    downsample_block_type="conv",
    upsample_block_type="interpolate",
)
MIX = dataclasses.replace(
    SANA,
    encoder_layers_per_block=(0, 2, 1, 1),
    decoder_layers_per_block=(0, 2, 1, 1),
    decoder_norm_types=("batch_norm", "batch_norm", "rms_norm", "rms_norm"),
    decoder_act_fns=("relu", "relu", "silu", "silu"),
    downsample_block_type="pixel_unshuffle",
    upsample_block_type="pixel_shuffle",
)
LITE = dataclasses.replace(MIX, decoder_block_types="ResBlock", decoder_qkv_multiscales=((),) * 4)
CONFIGS = {"sana": SANA, "mix": MIX, "lite": LITE}
HEIGHT, WIDTH = 96, 16  # 24 rows on the grid of stage 2, where the strips are cut


@functools.cache
def random_params(config):
    shapes = jax.eval_shape(Autoencoder(config).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key == "var":
            return jnp.asarray(rng.uniform(0.5, 2, leaf.shape), jnp.float32)
        return jnp.asarray(rng.normal(0, 1, leaf.shape) / np.sqrt(leaf.size / leaf.shape[-1]), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def plain(config, method):
    """Random input and the plain call's output."""
    shape = (2, HEIGHT // 8, WIDTH // 8, 4) if method == "decode" else (2, HEIGHT, WIDTH, 3)
    x = jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)
    run = jax.jit(functools.partial(Autoencoder(config).apply, method=method))
    return x, np.asarray(run({"params": random_params(config)}, x))


def in_strips(config, method, strips):
    run = {"decode": decode_in_strips, "encode": encode_in_strips}[method]
    run = jax.jit(functools.partial(run, Autoencoder(config), strips=strips))
    return np.asarray(run(random_params(config), plain(config, method)[0]))


def row_errors(config, method, strips):
    """The largest error of each row, relative to the output's range."""
    expected = plain(config, method)[1]
    found = in_strips(config, method, strips)
    assert found.shape == expected.shape
    return np.abs(found - expected).max((0, 2, 3)) / np.abs(expected).max()


# 24 rows: strips of 24, 5 (ragged: the last begins at 19) and 2 rows; without attention 12 rows on a grid coarser.
@pytest.mark.parametrize("strips", [1, 5, 12])
@pytest.mark.parametrize(
    ("name", "method"),
    [("sana", "decode"), ("sana", "encode"), ("mix", "decode"), ("mix", "encode"), ("lite", "decode")],
)
def test_strips_are_the_plain_call(name, method, strips):
    assert row_errors(CONFIGS[name], method, strips).max() < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_the_rows_at_a_strips_border_carry_no_larger_error(name):
    errors = row_errors(CONFIGS[name], "decode", 6)
    at_border = np.isin(np.arange(HEIGHT) % (HEIGHT // 6), [0, 1, HEIGHT // 6 - 2, HEIGHT // 6 - 1])
    # Rounding differs by a few units in the last place from one processor to the next; a missing row is 1e-4 and more.
    assert errors[at_border].max() <= 1.5 * errors[~at_border].max() + 5e-7


@pytest.mark.parametrize(("name", "step"), [("sana", 0), ("sana", 1), ("sana", 2), ("mix", 0), ("mix", 1)])
def test_a_halo_one_row_too_small_is_seen(name, step, monkeypatch):
    config = CONFIGS[name]
    steps = autoencoder_strips._decoder_steps(config, 2)
    steps[step] = steps[step]._replace(halo=steps[step].halo - 1)
    monkeypatch.setattr(autoencoder_strips, "_decoder_steps", lambda *_: steps)
    assert row_errors(config, "decode", 6).max() > 1e-4


@pytest.mark.parametrize(("name", "step"), [("sana", 1), ("sana", 2), ("mix", 1)])
def test_an_encoder_halo_too_small_is_seen(name, step, monkeypatch):
    """By two rows, because halos are even there: 6 and 14 where 5 and 13 rows matter."""
    config = CONFIGS[name]
    steps = autoencoder_strips._encoder_steps(config, 2)
    steps[step] = steps[step]._replace(halo=steps[step].halo - 2)
    monkeypatch.setattr(autoencoder_strips, "_encoder_steps", lambda *_: steps)
    assert row_errors(config, "encode", 6).max() > 1e-4


@pytest.mark.parametrize("method", ["decode", "encode"])
def test_an_attention_block_that_misses_a_row_is_seen(method, monkeypatch):
    monkeypatch.setattr(autoencoder_strips, "_scale_reach", lambda scales: max(scales) // 2 - 1)
    assert row_errors(SANA, method, 6).max() > 1e-4


def test_a_row_counted_twice_in_the_attentions_state_is_seen(monkeypatch):
    """24 rows in strips of 5: the last one shares a row with the one before."""
    monkeypatch.setattr(autoencoder_strips, "LiteMLAState", lambda *args, **kwargs: _EveryRow(*args, **kwargs))
    assert row_errors(SANA, "decode", 5).max() > 1e-4


class _EveryRow(LiteMLAState):
    def __call__(self, x, counted):
        return super().__call__(x, jnp.ones_like(counted))


def test_the_split_is_the_finest_stage_with_attention():
    for preset in (presets.dc_ae_f32c32_sana_1_1(), presets.dc_ae_f64c128_in_1_0(), presets.dc_ae_f128c512_in_1_0()):
        assert autoencoder_strips._split(preset, "decoder") == autoencoder_strips._split(preset, "encoder") == 3
    assert autoencoder_strips._split(presets.dc_ae_lite_f32c32_sana_1_1(), "decoder") == 3
    assert autoencoder_strips._split(SANA, "decoder") == 2


def test_halos_of_the_public_decoder():
    """Counted by hand: 3 ResBlocks of two convolutions and the Up block's at each grid, one convolution at the end."""
    steps = autoencoder_strips._decoder_steps(presets.dc_ae_f32c32_sana_1_1(), 3)
    # Full resolution: 1, 7 before the blocks, 8 before the Up block's convolution; half: 4, 10, 11; quarter: 6, 12, 13.
    assert [tuple(step) for step in steps] == [(2, 3, 7), (1, 2, 6), (0, 1, 4), (None, 0, 1)]


def test_attention_at_full_resolution_is_an_error():
    config = dataclasses.replace(SANA, decoder_block_types="EfficientViTBlock")
    with pytest.raises(ValueError, match="decoder has attention at full resolution"):
        decode_in_strips(Autoencoder(config), random_params(SANA), plain(SANA, "decode")[0], 2)
    assert choose_strips(config, 4096, 4096) == 1
    encoder = dataclasses.replace(SANA, encoder_block_types="EfficientViTBlock")
    with pytest.raises(ValueError, match="encoder has attention at full resolution"):
        encode_in_strips(Autoencoder(encoder), random_params(SANA), plain(SANA, "encode")[0], 2)


@pytest.mark.parametrize("strips", [0, 25])
def test_a_number_of_strips_that_the_grid_has_not_is_an_error(strips):
    with pytest.raises(ValueError, match=f"strips={strips}: .* 24 rows here; use 1 to 24"):
        in_strips(SANA, "decode", strips)


def test_a_picture_that_the_factor_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="picture 90x16: both sides must be multiples of 8"):
        encode_in_strips(Autoencoder(SANA), random_params(SANA), jnp.zeros((1, 90, 16, 3)), 2)


@pytest.mark.parametrize(
    ("height", "width", "strips"), [(1024, 1024, 1), (2048, 2048, 1), (2080, 2048, 5), (4096, 4096, 16), (32, 2**18, 4)]
)
def test_strips_are_chosen_by_size(height, width, strips):
    assert choose_strips(presets.dc_ae_f32c32_sana_1_1(), height, width) == strips


@pytest.mark.slow
def test_the_public_decoder_at_256_in_strips():
    config = presets.dc_ae_f32c32_sana_1_1()
    module = Autoencoder(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]["decoder"]
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32) / np.sqrt(s.size / s.shape[-1])), shapes
    )
    latents = jnp.asarray(rng.standard_normal((1, 8, 8, 32)), jnp.float32)
    expected = jax.jit(lambda p, x: module.apply({"params": {"decoder": p}}, x, method="decode"))(params, latents)
    found = jax.jit(lambda p, x: decode_in_strips(module, {"decoder": p}, x, 5))(params, latents)
    errors = np.abs(np.asarray(found - expected)).max((0, 2, 3)) / np.abs(np.asarray(expected)).max()
    assert errors.max() < 1e-5


@pytest.fixture(scope="module")
def pipe():
    return SanaPipeline(tiny_parts())


def test_the_pipeline_decodes_in_strips(pipe):
    picture = pipe("a red apple", output_type="np")
    np.testing.assert_allclose(pipe("a red apple", output_type="np", decode_strips=3), picture, atol=2e-6)


def test_the_pipeline_chooses_strips_for_large_pictures_and_takes_one_after_the_other(pipe, monkeypatch):
    called = []

    def recorded(function):
        def record(autoencoder, params, x, *, strips):
            called.append((function.__name__, x.shape[0], strips))
            return function(autoencoder, params, x, strips)

        return record

    for function in (decode_in_strips, encode_in_strips):
        monkeypatch.setattr(program, function.__name__, recorded(function))
    image = np.random.default_rng(0).random((2, 24, 16, 3), np.float32)
    call = functools.partial(pipe, ["a red apple", "fox"], image=image, height=24, width=16, output_type="np")
    pictures = call()
    assert not called
    monkeypatch.setattr(autoencoder_strips, "LARGEST_PLAIN", 300)
    monkeypatch.setattr(autoencoder_strips, "STRIP_PIXELS", 150)
    found = call()
    assert called == [("encode_in_strips", 1, 3), ("decode_in_strips", 1, 3)]
    np.testing.assert_allclose(found, pictures, atol=5e-6)


def test_the_pipeline_refuses_strips_before_anything_is_computed(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "programs", None)
    with pytest.raises(ValueError, match="strips=5: .* 4 rows here"):
        pipe("a red apple", decode_strips=5)
