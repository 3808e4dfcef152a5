"""Perturbed attention guidance against diffusers' SanaPAGPipeline: folders, latents, pictures from the same noise."""

import dataclasses
import json

import numpy as np
import pytest

from sana_jax import SanaPipeline
from sana_jax.pipeline import initial_noise

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from tiny_diffusers import save_tiny

OWN = {"complex_human_instruction": None, "max_sequence_length": 12}
PROMPTS = ["A red apple on a blue background", "pear"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pag")
    return save_tiny(diffusers.SanaPAGPipeline, path, transformer={"num_layers": 3}, own=OWN), path


@pytest.fixture(scope="module")
def ours(theirs):
    return SanaPipeline.from_pretrained(theirs[1])


@pytest.fixture(scope="module")
def noise():
    return np.asarray(initial_noise(0, np.arange(2), (4, 4, 8)))


@pytest.fixture(autouse=True)
def divisible_by_4(monkeypatch):
    """diffusers insists on multiples of 32 pixels, whatever the autoencoder's factor."""
    monkeypatch.setattr(diffusers.SanaPAGPipeline, "check_inputs", lambda *args, **kwargs: None)


def run_theirs(pipe, noise, output_type="latent", guidance_scale=3.0, **kwargs):
    out = pipe(
        PROMPTS,
        negative_prompt="blurry",
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        height=16,
        width=16,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type=output_type,
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=12,
        complex_human_instruction=None,
        **kwargs,
    ).images
    return out.numpy().transpose(0, 2, 3, 1) if output_type == "latent" else out


def run_ours(pipe, noise, output_type="latent", guidance_scale=3.0, **kwargs):
    options = dict(num_inference_steps=5, guidance_scale=guidance_scale, negative_prompt="blurry")
    return pipe(PROMPTS, latents=noise, output_type=output_type, **options, **kwargs)


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def test_a_folder_of_theirs_gives_their_pictures_by_itself(theirs, ours, noise, measured):
    assert (ours.defaults.pag_scale, ours.defaults.pag_layers) == (3.0, (0,))
    expected = np.stack([np.asarray(picture, np.int16) for picture in run_theirs(theirs[0], noise, "pil")])
    pictures = np.stack([np.asarray(picture, np.int16) for picture in run_ours(ours, noise, "pil")])
    measured("SANA with PAG", "pictures, of 255", np.abs(pictures - expected).max(), 2)
    assert expected.std() > 5
    plain = np.stack([np.asarray(picture, np.int16) for picture in run_ours(ours, noise, "pil", pag_scale=0.0)])
    assert np.abs(plain - expected).max() > 2


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
@pytest.mark.parametrize(
    "names,layers,scale,adaptive",
    [("transformer_blocks.0", (0,), 2.0, 0.0), (r"transformer_blocks\.[12]", (1, 2), 4.0, 0.006)],
)
def test_latents_are_those_of_diffusers(theirs, ours, noise, guidance_scale, names, layers, scale, adaptive, measured):
    theirs[0].pag_applied_layers = [names]
    strength = {"pag_scale": scale, "pag_adaptive_scale": adaptive, "guidance_scale": guidance_scale}
    expected = run_theirs(theirs[0], noise, **strength)
    theirs[0].pag_applied_layers = ["transformer_blocks.0"]
    error = relative(run_ours(ours, noise, **strength, pag_layers=layers), expected)
    measured("SANA with PAG", "final latents", error, 1e-3)
    # Another block, and a strength that does not fade.
    assert relative(run_ours(ours, noise, **strength, pag_layers=(1,)), expected) > 1e-3
    if adaptive:
        assert relative(run_ours(ours, noise, **strength | {"pag_adaptive_scale": 0.0}), expected) > 1e-3


class WithNorms:
    """What diffusers' PAG processors would be with the norms of q and k kept in the normal branches."""

    def __init__(self, branches):
        self.branches = branches

    def __call__(self, attn, hidden_states, **kwargs):
        *normal, perturbed = hidden_states.chunk(self.branches)
        normal = SanaLinearAttnProcessor2_0()(attn, torch.cat(normal))
        return torch.cat([normal, attn.to_out[0](attn.to_v(perturbed))])


def test_models_with_qk_norm_keep_it_where_diffusers_drops_it(tmp_path, noise):
    """In the perturbed block diffusers leaves the norms out of the normal branches too; ours are the model's own."""
    options = {"num_layers": 2, "qk_norm": "rms_norm_across_heads"}
    theirs = save_tiny(diffusers.SanaPAGPipeline, tmp_path, transformer=options, own=OWN)
    ours = run_ours(SanaPipeline.from_pretrained(tmp_path), noise)
    assert relative(ours, run_theirs(theirs, noise)) > 1e-2
    theirs.set_pag_applied_layers("transformer_blocks.0", (WithNorms(3), WithNorms(2)))
    assert relative(ours, run_theirs(theirs, noise)) < 1e-3


def test_a_folder_of_ours_opens_as_sana_pag_pipeline_with_the_same_blocks(ours, noise, tmp_path):
    kept = SanaPipeline.from_pretrained(None)
    kept.defaults = dataclasses.replace(kept.defaults, pag_scale=2.0, pag_layers=(1, 4))
    kept.save_pretrained(tmp_path, dtype="float16")
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "SanaPAGPipeline"
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True, text_encoder=None)
    assert type(again).__name__ == "SanaPAGPipeline"
    again._set_pag_attn_processor(again.pag_applied_layers, do_classifier_free_guidance=True)
    changed = [name for name in again.pag_attn_processors]
    assert changed == [f"transformer_blocks.{i}.attn1.processor" for i in (1, 4)]
    assert SanaPipeline.from_pretrained(tmp_path).defaults.pag_layers == (1, 4)
