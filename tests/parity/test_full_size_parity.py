"""Public sizes against diffusers, random weights in every parameter: whole models in fp32, full widths in bf16.

Takes minutes and 16 GB. Weights go from diffusers to ours through a folder on disk, as a user's would.
"""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.models import presets
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.transformer import SanaTransformer
from sana_jax.weights import autoencoder as autoencoder_weights
from sana_jax.weights import transformer as transformer_weights
from sana_jax.weights.folder import load_autoencoder, load_transformer

pytestmark = [pytest.mark.parity, pytest.mark.slow]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TEXT_TOKENS = 300
# tests/conftest.py turns LLVM's optimisations off, which these programs run too long for.
OPTIMISED = {"xla_backend_optimization_level": 3}


@torch.no_grad()
def randomised(model):
    """Random values everywhere, of a size that leaves the activations finite through any depth."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        parameter.normal_(std=fan_in**-0.5, generator=generator)
        if parameter.ndim == 1 and "norm" in name:
            parameter.add_(1)
    return model.eval()


def transformer_pair(config, path):
    """diffusers' model, and a folder with its weights."""
    values = transformer_weights.config_to_json(config)
    model = randomised(diffusers.SanaTransformer2DModel.from_config(values))
    model.save_pretrained(path)
    return model


def transformer_inputs(config, height, width):
    rng = np.random.default_rng(1)
    mask = np.ones((1, TEXT_TOKENS), np.int32)
    mask[:, 40:] = 0
    return {
        "latents": rng.standard_normal((1, height, width, config.in_channels)).astype(np.float32),
        "timesteps": np.array([749.0], np.float32),
        "text_features": rng.standard_normal((1, TEXT_TOKENS, config.caption_channels)).astype(np.float32),
        "text_mask": mask,
    }


@torch.no_grad()
def their_velocity(model, inputs, dtype=torch.float32):
    out = model.to(dtype)(
        torch.tensor(inputs["latents"].transpose(0, 3, 1, 2), dtype=dtype),
        encoder_hidden_states=torch.tensor(inputs["text_features"], dtype=dtype),
        timestep=torch.tensor(inputs["timesteps"]),
        encoder_attention_mask=torch.tensor(inputs["text_mask"]),
    ).sample
    return out.float().numpy().transpose(0, 2, 3, 1)


def our_velocity(module, params, inputs):
    run = jax.jit(module.apply, compiler_options=OPTIMISED)
    return np.asarray(run({"params": params}, **{name: jnp.asarray(value) for name, value in inputs.items()}))


def error(ours, theirs):
    """Largest difference over the range of the true values."""
    return np.abs(ours - theirs).max() / np.ptp(theirs)


def test_the_1600m_transformer_at_1024_pixels(tmp_path, measured):
    config = presets.sana_1600m(32)
    inputs = transformer_inputs(config, 32, 32)
    theirs = transformer_pair(config, tmp_path)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 1_604_462_752
    expected = their_velocity(theirs, inputs)
    del theirs
    gc.collect()
    module, params = load_transformer(tmp_path)
    found = error(our_velocity(module, params, inputs), expected)
    measured("SANA 1.6B", "velocity at 1024x1024, all 20 blocks", found, 1e-4)
    assert np.isfinite(expected).all() and expected.std() > 0.1
    swapped = {**params, "scale_shift_table": np.asarray(params["scale_shift_table"])[::-1]}
    assert error(our_velocity(module, swapped, inputs), expected) > 1e-2


def test_the_whole_dc_ae_sana_1_1_at_512_pixels(tmp_path, measured):
    values = autoencoder_weights.config_to_json(presets.dc_ae_f32c32_sana_1_1())
    theirs = randomised(diffusers.AutoencoderDC.from_config(values))
    theirs.save_pretrained(tmp_path)
    images = np.random.default_rng(1).uniform(-1, 1, (1, 512, 512, 3)).astype(np.float32)
    with torch.no_grad():
        latents = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent
        decoded = theirs.decode(latents).sample.numpy().transpose(0, 2, 3, 1)
    latents = latents.numpy().transpose(0, 2, 3, 1)
    module, params = load_autoencoder(tmp_path)

    def run(method, x):
        return np.asarray(
            jax.jit(lambda params, x: module.apply({"params": params}, x, method=method), compiler_options=OPTIMISED)(
                params, jnp.asarray(x)
            )
        )

    for method, x, expected in (("encode", images, latents), ("decode", latents, decoded)):
        found = error(run(method, x), expected)
        measured("DC-AE f32c32 sana-1.0, 1.1", f"{method} at 512x512, the whole model", found, 1e-4)
    assert error(run("decode", latents[:, ::-1]), decoded) > 1e-2
    assert latents.std() > 0.01 and decoded.std() > 0.01


def test_bfloat16_is_no_further_from_float32_than_diffusers_at_full_width(tmp_path):
    config = presets.sana_600m(16, num_layers=4)
    inputs = transformer_inputs(config, 12, 20)
    theirs = transformer_pair(config, tmp_path)
    exact = their_velocity(theirs, inputs)
    rounded = their_velocity(theirs, inputs, torch.bfloat16)
    module, params = load_transformer(tmp_path, dtype="bfloat16")
    module = SanaTransformer(dataclasses.replace(module.config, dtype="bfloat16"))
    ours = our_velocity(module, params, inputs)

    def rms(x):
        return np.sqrt(np.mean(np.square(x - exact)))

    assert 0 < rms(ours) <= rms(rounded)


def test_bfloat16_decoding_is_no_further_from_float32_than_diffusers(tmp_path):
    config = presets.dc_ae_f32c32_sana_1_1()
    theirs = randomised(diffusers.AutoencoderDC.from_config(autoencoder_weights.config_to_json(config)))
    theirs.save_pretrained(tmp_path)
    latents = np.random.default_rng(2).standard_normal((1, 4, 6, 32)).astype(np.float32)

    @torch.no_grad()
    def decode(dtype):
        out = theirs.to(dtype).decode(torch.tensor(latents.transpose(0, 3, 1, 2), dtype=dtype)).sample
        return out.float().numpy().transpose(0, 2, 3, 1)

    exact, rounded = decode(torch.float32), decode(torch.bfloat16)
    module, params = load_autoencoder(tmp_path, dtype="bfloat16")
    module = Autoencoder(dataclasses.replace(module.config, dtype="bfloat16"))
    run = jax.jit(lambda params, x: module.apply({"params": params}, x, method="decode"), compiler_options=OPTIMISED)
    ours = np.asarray(run(params, jnp.asarray(latents)))

    def rms(x):
        return np.sqrt(np.mean(np.square(x - exact)))

    assert 0 < rms(ours) <= rms(rounded)
