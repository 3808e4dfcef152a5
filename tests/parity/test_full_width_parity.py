"""Every released width against diffusers and transformers, few layers deep: float32, and what bfloat16 adds in error."""

import dataclasses
import functools
import json
from typing import NamedTuple

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from parity_errors import relative_error, rounding_ratio
from random_models import (
    OPTIMISED,
    computing_in,
    nchw,
    nhwc,
    one_thread,
    randomised,
    rounded,
    rounded_more,
    their_velocity,
    transformer_inputs,
)

from sana_jax.models import presets
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.text_encoder import TextEncoder
from sana_jax.models.transformer import SanaTransformer
from sana_jax.weights import autoencoder as autoencoder_weights
from sana_jax.weights import layout
from sana_jax.weights import text_encoder as text_encoder_weights
from sana_jax.weights import transformer as transformer_weights
from sana_jax.weights.parts import abstract_params

pytestmark = pytest.mark.parity

BF16 = "bf16: rms error over that of diffusers in bf16"
NO_LARGER = 1.0


class Case(NamedTuple):
    """Inputs, and what the public implementation makes of them: in float32, and in bfloat16 where it is compared.

    PyTorch's bfloat16 is slow on CPUs without instructions for it: its inputs are small ones.
    """

    inputs: dict
    exact: np.ndarray
    rounded: np.ndarray | None = None


class Pair(NamedTuple):
    """A module of ours, its parameters, and the two cases."""

    module: object
    params: dict
    full: Case
    small: Case | None


@functools.cache
def compiled(module, method=None):
    return jax.jit(functools.partial(module.apply, method=method), compiler_options=OPTIMISED)


def our_params(entries, tensors, module):
    ignore = lambda name: name.endswith("num_batches_tracked")
    return layout.read(entries, {k: v.numpy() for k, v in tensors.items()}, abstract_params(module), ignore=ignore)


TRANSFORMERS = {
    "SANA 0.6B": presets.sana_600m(16, num_layers=2),
    "SANA 1.6B": presets.sana_1600m(num_layers=1),
    "SANA 1.6B 2K, 4K": presets.sana_1600m(128, num_layers=1),  # of one grid, the two have the same position table
    "SANA-1.5 1.6B, 4.8B": presets.sana15_1600m(num_layers=1),
    "SANA-Sprint 0.6B": presets.sprint_600m(num_layers=2),
    "SANA-Sprint 1.6B": presets.sprint_1600m(num_layers=1),
}


@pytest.fixture(scope="module", params=TRANSFORMERS)
def transformer(request):
    config = TRANSFORMERS[request.param]
    theirs = randomised(diffusers.SanaTransformer2DModel.from_config, transformer_weights.config_to_json(config))
    module = SanaTransformer(config)
    params = our_params(transformer_weights.entries(config), theirs.state_dict(), module)
    full = transformer_inputs(config, 6, 10, text_lengths=(40, 300))
    small = transformer_inputs(config, 4, 6, text_lengths=(20,), text_tokens=30)
    exact = [their_velocity(theirs, config, inputs) for inputs in (full, small)]
    params = jax.tree.map(np.array, params)  # theirs are rounded in place
    with one_thread():
        rounded_output = their_velocity(theirs, config, small, torch.bfloat16)
    return request.param, Pair(module, params, Case(full, exact[0]), Case(small, exact[1], rounded_output))


def velocity(pair, params, inputs, dtype="float32"):
    return np.asarray(compiled(computing_in(pair.module, dtype))({"params": params}, **inputs))


def test_velocity_equals_diffusers(transformer, measured):
    name, pair = transformer
    inputs, exact, _ = pair.full
    measured(name, "velocity, full width", relative_error(velocity(pair, pair.params, inputs), exact), 1e-4)
    swapped = {**pair.params, "scale_shift_table": pair.params["scale_shift_table"][::-1]}
    assert relative_error(velocity(pair, swapped, inputs), exact) > 1e-2


def test_bfloat16_velocity_is_no_further_from_float32_than_diffusers(transformer, measured):
    name, pair = transformer
    inputs, exact, theirs = pair.small
    ours = velocity(pair, rounded(pair.params), inputs, "bfloat16")
    measured(name, f"velocity, {BF16}", rounding_ratio(ours, theirs, exact), NO_LARGER)
    coarser = velocity(pair, rounded_more(pair.params), inputs, "bfloat16")
    assert rounding_ratio(coarser, theirs, exact) > NO_LARGER


def few_layers(preset, stages=6, first=0, **overrides):
    layers = (first,) + (1,) * (stages - 1)
    return preset(**{"encoder_layers_per_block": layers, "decoder_layers_per_block": layers, **overrides})


AUTOENCODERS = {
    "DC-AE f32c32 sana-1.0, 1.1": few_layers(presets.dc_ae_f32c32_sana_1_1, first=1),
    "DC-AE lite f32c32": few_layers(presets.dc_ae_lite_f32c32_sana_1_1, encoder_layers_per_block=(1,) * 6),
    "DC-AE f32c32 in-1.0, mix-1.0": few_layers(presets.dc_ae_f32c32_in_1_0),
    "DC-AE f64c128 in-1.0, mix-1.0": few_layers(presets.dc_ae_f64c128_in_1_0, stages=7),
    "DC-AE f128c512 in-1.0, mix-1.0": few_layers(presets.dc_ae_f128c512_in_1_0, stages=8),
}


@pytest.fixture(scope="module", params=AUTOENCODERS)
def autoencoder(request):
    """{"encode": Pair, "decode": Pair} for a picture of 128x384; of the f32 families small ones too."""
    config = AUTOENCODERS[request.param]
    theirs = randomised(diffusers.AutoencoderDC.from_config, autoencoder_weights.config_to_json(config))
    module = Autoencoder(config)
    params = our_params(autoencoder_weights.entries(config), theirs.state_dict(), module)

    @torch.no_grad()
    def encode(pictures, dtype=torch.float32):
        return nhwc(theirs.to(dtype).encode(nchw(pictures, dtype)).latent)

    @torch.no_grad()
    def decode(latents, dtype=torch.float32):
        return nhwc(theirs.to(dtype).decode(nchw(latents, dtype)).sample)

    pictures = np.random.default_rng(1).uniform(-1, 1, (1, 128, 384, 3)).astype(np.float32)
    latents = encode(pictures)
    full = Case(pictures, latents), Case(latents, decode(latents))
    small = None, None
    if config.downsample_factor == 32:
        few_pictures, few_latents = pictures[:, :32, :64], latents[:, :1, :2]
        exact = encode(few_pictures), decode(few_latents)
        params = jax.tree.map(np.array, params)  # theirs are rounded in place
        with one_thread():
            small = (
                Case(few_pictures, exact[0], encode(few_pictures, torch.bfloat16)),
                Case(few_latents, exact[1], decode(few_latents, torch.bfloat16)),
            )
    pairs = {method: Pair(module, params, *cases) for method, *cases in zip(("encode", "decode"), full, small)}
    return request.param, pairs


def coded(pair, method, params, x, dtype="float32"):
    return np.asarray(compiled(computing_in(pair.module, dtype), method)({"params": params}, x))


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_encode_and_decode_equal_diffusers(autoencoder, method, measured):
    name, pair = autoencoder[0], autoencoder[1][method]
    x, exact, _ = pair.full
    measured(name, f"{method}, full width", relative_error(coded(pair, method, pair.params, x), exact), 1e-4)
    part = f"{method}r"
    turned = jax.tree.map(lambda x: x.swapaxes(0, 1) if x.ndim == 4 else x, pair.params[part]["conv_in"])
    params = {**pair.params, part: {**pair.params[part], "conv_in": turned}}
    assert relative_error(coded(pair, method, params, x), exact) > 1e-2


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_bfloat16_is_no_further_from_float32_than_diffusers(autoencoder, method, measured):
    name, pair = autoencoder[0], autoencoder[1][method]
    if pair.small is None:
        pytest.skip("blocks of the f32 families at other widths; PyTorch's bfloat16 is slow on CPU")
    x, exact, theirs = pair.small
    ours = coded(pair, method, rounded(pair.params), x, "bfloat16")
    measured(name, f"{method}, {BF16}", rounding_ratio(ours, theirs, exact), NO_LARGER)
    coarser = coded(pair, method, rounded_more(pair.params), x, "bfloat16")
    assert rounding_ratio(coarser, theirs, exact) > NO_LARGER


@pytest.fixture(scope="module")
def gemma():
    """Two layers of Gemma-2-2b, one of them with the window, and only 1000 of its tokens."""
    config = transformers.Gemma2Config(vocab_size=1000, num_hidden_layers=2, attn_implementation="eager")
    theirs = randomised(transformers.Gemma2Model, config)
    with torch.no_grad():
        for layer in theirs.layers:  # scores of trained models reach the soft-cap; these do so too
            layer.self_attn.q_proj.weight.mul_(6)
    module = TextEncoder(text_encoder_weights.config_from_json(json.loads(config.to_json_string())))
    assert module.config == presets.gemma2_2b(vocab_size=1000, num_layers=2)
    params = our_params(text_encoder_weights.entries(module.config), theirs.state_dict(), module)
    params = jax.tree.map(np.array, params)
    rng, cases = np.random.default_rng(0), []
    for lengths, dtypes in (((300, 40), ["float32"]), ((25, 9), ["float32", "bfloat16"])):
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)
        inputs = {"token_ids": rng.integers(5, 1000, mask.shape).astype(np.int32) * mask, "mask": mask}
        ids, valid = torch.tensor(inputs["token_ids"]).long(), torch.tensor(mask).long()
        outputs = []
        for dtype in dtypes:
            with torch.no_grad():
                hidden = theirs.to(getattr(torch, dtype))(ids, attention_mask=valid)[0]
            outputs.append(hidden.float().numpy()[mask.astype(bool)])
        cases.append(Case(inputs, *outputs))
    return Pair(module, params, *cases)


def hidden_states(pair, params, inputs, dtype="float32", **changes):
    module = TextEncoder(dataclasses.replace(pair.module.config, dtype=dtype, **changes))
    hidden = compiled(module)({"params": params}, **inputs)
    return np.asarray(hidden, np.float32)[inputs["mask"].astype(bool)]


def test_hidden_states_equal_transformers(gemma, measured):
    inputs, exact, _ = gemma.full
    error = relative_error(hidden_states(gemma, gemma.params, inputs), exact)
    measured("Gemma-2-2b-it", "hidden states, full width", error, 1e-4)
    uncapped = hidden_states(gemma, gemma.params, inputs, attn_logit_softcap=None)
    assert relative_error(uncapped, exact) > 1e-2


def test_bfloat16_hidden_states_are_no_further_from_float32_than_transformers(gemma, measured):
    inputs, exact, theirs = gemma.small
    ours = hidden_states(gemma, rounded(gemma.params), inputs, "bfloat16")
    measured("Gemma-2-2b-it", f"hidden states, {BF16}", rounding_ratio(ours, theirs, exact), NO_LARGER)
    coarser = hidden_states(gemma, rounded_more(gemma.params), inputs, "bfloat16")
    assert rounding_ratio(coarser, theirs, exact) > NO_LARGER
