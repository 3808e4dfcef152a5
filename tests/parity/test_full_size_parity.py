"""Public models whole, float32 and random weights in every parameter, against diffusers; and the whole decoder in bfloat16.

Takes minutes and 16 GB. Weights go from diffusers to ours through a folder on disk, as a user's would.
"""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from parity_errors import relative_error, rounding_ratio
from random_models import (
    OPTIMISED,
    computing_in,
    nchw,
    nhwc,
    one_thread,
    randomised,
    rounded_more,
    their_velocity,
    transformer_inputs,
)

from sana_jax.models import presets
from sana_jax.weights import autoencoder as autoencoder_weights
from sana_jax.weights import transformer as transformer_weights
from sana_jax.weights.folder import load_autoencoder, load_transformer

pytestmark = [pytest.mark.parity, pytest.mark.slow]


def test_the_1600m_transformer_at_1024_pixels(tmp_path, measured):
    config = presets.sana_1600m(32)
    inputs = transformer_inputs(config, 32, 32, text_lengths=(40,))
    theirs = randomised(diffusers.SanaTransformer2DModel.from_config, transformer_weights.config_to_json(config))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 1_604_462_752
    theirs.save_pretrained(tmp_path)
    expected = their_velocity(theirs, config, inputs)
    del theirs
    gc.collect()
    module, params = load_transformer(tmp_path)
    run = jax.jit(module.apply, compiler_options=OPTIMISED)
    measured(
        "SANA 1.6B", "velocity, whole at 1024 pixels", relative_error(run({"params": params}, **inputs), expected), 1e-4
    )
    assert np.isfinite(expected).all() and expected.std() > 0.1
    swapped = {**params, "scale_shift_table": np.asarray(params["scale_shift_table"])[::-1]}
    assert relative_error(run({"params": swapped}, **inputs), expected) > 1e-2


@pytest.fixture(scope="module")
def dc_ae(tmp_path_factory):
    """diffusers' DC-AE sana-1.1, and a folder with its weights."""
    path = tmp_path_factory.mktemp("dc_ae")
    values = autoencoder_weights.config_to_json(presets.dc_ae_f32c32_sana_1_1())
    theirs = randomised(diffusers.AutoencoderDC.from_config, values)
    theirs.save_pretrained(path)
    return theirs, path


def compiled(module, method):
    return jax.jit(lambda params, x: module.apply({"params": params}, x, method=method), compiler_options=OPTIMISED)


def test_the_whole_dc_ae_sana_1_1_at_512_pixels(dc_ae, measured):
    theirs, path = dc_ae
    images = np.random.default_rng(1).uniform(-1, 1, (1, 512, 512, 3)).astype(np.float32)
    with torch.no_grad():
        latents = nhwc(theirs.encode(nchw(images)).latent)
        decoded = nhwc(theirs.decode(nchw(latents)).sample)
    assert latents.std() > 0.01 and decoded.std() > 0.01
    module, params = load_autoencoder(path)
    name = "DC-AE f32c32 sana-1.0, 1.1"
    for method, x, expected in (("encode", images, latents), ("decode", latents, decoded)):
        run = compiled(module, method)
        measured(name, f"{method}, whole at 512 pixels", relative_error(run(params, x), expected), 1e-4)
    assert relative_error(run(params, latents[:, ::-1]), decoded) > 1e-2


def test_bfloat16_decoding_is_no_further_from_float32_than_diffusers(dc_ae, measured):
    theirs, path = dc_ae
    latents = np.random.default_rng(2).standard_normal((1, 4, 6, 32)).astype(np.float32)

    @torch.no_grad()
    def decode(dtype):
        return nhwc(theirs.to(dtype).decode(nchw(latents, dtype)).sample)

    exact = decode(torch.float32)
    with one_thread():
        their_rounded = decode(torch.bfloat16)
    module, params = load_autoencoder(path, dtype="bfloat16")
    run = compiled(computing_in(module, "bfloat16"), "decode")
    ratio = rounding_ratio(run(params, jnp.asarray(latents)), their_rounded, exact)
    measured("DC-AE f32c32 sana-1.0, 1.1", "whole decoder, bf16: rms error over that of diffusers in bf16", ratio, 1)
    coarser = run(rounded_more(params), jnp.asarray(latents))
    assert rounding_ratio(coarser, their_rounded, exact) > 1
