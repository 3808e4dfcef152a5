"""LoRAs that diffusers and PEFT write: the same velocities and pictures with them."""

import jax
import numpy as np
import pytest

from sana_jax import SanaPipeline
from sana_jax.diffusion.noise import initial_noise
from sana_jax.training import lora as training_lora
from sana_jax.weights import folder
from sana_jax.weights.lora import open_lora, save

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from diffusers.training_utils import _collate_lora_metadata
from parity_errors import relative_error
from tiny_diffusers import allow_any_size, draw, save_tiny

OWN = {"complex_human_instruction": None, "max_sequence_length": 12}
TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "conv_inverted", "conv_point", "proj_out", "timestep_embedder.linear_1"]
PROMPT = ["A red apple on a blue background"]


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    allow_any_size(monkeypatch, diffusers.SanaPipeline)
    return save_tiny(diffusers.SanaPipeline, tmp_path / "model", own=OWN)


def add_adapter(transformer, **settings):
    """A LoRA with no factor zero; returns its tensors."""
    transformer.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, target_modules=TARGETS, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return peft.utils.get_peft_model_state_dict(transformer)


def pictures(pipe, noise):
    arguments = dict(num_inference_steps=3, guidance_scale=3.0)
    if isinstance(pipe, SanaPipeline):
        return pipe(PROMPT, latents=noise, output_type="latent", height=16, width=16, **arguments)
    text = dict(max_sequence_length=12, complex_human_instruction=None, clean_caption=False)
    return draw(pipe, PROMPT, noise, "latent", **arguments, **text)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 12},
        {"lora_alpha": 12, "use_rslora": True},
        {"lora_alpha": 4, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"attn1.to_q": 6, "conv_point": 1}},
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_a_lora_that_diffusers_wrote_draws_what_it_draws_there(theirs, tmp_path, settings, told):
    """`told`: in the file's metadata, without which diffusers takes alpha for r."""
    layers = add_adapter(theirs.transformer, **settings)
    metadata = _collate_lora_metadata({"transformer": theirs.transformer}) if told else {}
    diffusers.SanaPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers, **metadata)
    theirs.transformer.delete_adapters("default")
    theirs.load_lora_weights(tmp_path / "lora")

    noise = np.asarray(initial_noise(0, np.arange(1), (4, 4, 8)))
    expected = pictures(theirs, noise)
    ours = SanaPipeline.from_pretrained(tmp_path / "model", lora=tmp_path / "lora")
    assert relative_error(pictures(ours, noise), expected) < 1e-4
    assert relative_error(pictures(SanaPipeline.from_pretrained(tmp_path / "model"), noise), expected) > 1e-2


def test_a_lora_that_peft_wrote_and_a_weaker_one_are_what_they_are_there(theirs, tmp_path):
    settings = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=TARGETS)
    wrapped = peft.get_peft_model(theirs.transformer, settings)
    wrapped.save_pretrained(tmp_path / "lora")
    for module in wrapped.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.scale_layer(0.25)
    theirs.transformer = wrapped.merge_and_unload()
    module, params = folder.load_transformer(tmp_path / "model")
    found = folder.find_pipeline(tmp_path / "model", lora=open_lora(tmp_path / "lora"), lora_scale=0.25)
    _, adapted = folder.parts.read(found.transformer)
    theirs.transformer.save_pretrained(tmp_path / "merged")
    _, expected = folder.load_transformer(tmp_path / "merged")
    flat = dict(zip("ours before theirs".split(), map(flatten, (adapted, params, expected)), strict=True))
    assert relative_error(flat["ours"] - flat["before"], flat["theirs"] - flat["before"]) < 1e-5


def test_a_lora_of_ours_draws_in_diffusers_what_it_draws_here(theirs, tmp_path):
    module, params = folder.load_transformer(tmp_path / "model")
    rng = np.random.default_rng(0)
    factors = jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32),
        training_lora.init(jax.random.key(0), params, 4, training_lora.LAYERS),
    )
    save(tmp_path / "lora", module, factors, scale=0.5)
    noise = np.asarray(initial_noise(0, np.arange(1), (4, 4, 8)))
    before = pictures(theirs, noise)
    theirs.load_lora_weights(tmp_path / "lora")
    expected = pictures(theirs, noise)
    assert relative_error(before, expected) > 1e-2
    assert (
        relative_error(
            pictures(SanaPipeline.from_pretrained(tmp_path / "model", lora=tmp_path / "lora"), noise), expected
        )
        < 1e-4
    )

    joined = training_lora.joined(params, factors, 0.5)
    ours = SanaPipeline.from_pretrained(tmp_path / "model")
    ours.params["transformer"] = jax.tree.map(jax.numpy.asarray, joined)
    assert relative_error(pictures(ours, noise), pictures(theirs, noise)) < 1e-4


def flatten(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
