"""Perturbed attention guidance against diffusers' SanaPAGPipeline: folders, latents, pictures from the same noise."""

import dataclasses
import json

import numpy as np
import pytest

from sana_jax import SanaPipeline
from sana_jax.diffusion.noise import initial_noise

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from parity_errors import picture_error, relative_error
from tiny_diffusers import allow_any_size, draw, save_tiny

OWN = {"complex_human_instruction": None, "max_sequence_length": 12}
PROMPTS = ["A red apple on a blue background", "pear"]
LATENTS = ("SANA with PAG", "final latents, 1 to 20 steps")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pag")
    return save_tiny(diffusers.SanaPAGPipeline, path, transformer={"num_layers": 3}, own=OWN), path


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    allow_any_size(monkeypatch, diffusers.SanaPAGPipeline)


def run_theirs(pipe, noise, output_type="latent", **kwargs):
    arguments = dict(num_inference_steps=5, guidance_scale=3.0, negative_prompt="blurry")
    text = dict(max_sequence_length=12, complex_human_instruction=None, clean_caption=False)
    return draw(pipe, PROMPTS, noise, output_type, **{**arguments, **text, **kwargs})


def run_ours(pipe, noise, output_type="latent", **kwargs):
    height, width = (4 * side for side in noise.shape[1:3])
    arguments = dict(num_inference_steps=5, guidance_scale=3.0, negative_prompt="blurry", height=height, width=width)
    return pipe(PROMPTS, latents=noise, output_type=output_type, **{**arguments, **kwargs})


def test_a_folder_of_theirs_gives_their_pictures_by_itself(theirs, ours, noise, measured):
    assert (ours.defaults.pag_scale, ours.defaults.pag_layers) == (3.0, (0,))
    steps = dict(num_inference_steps=2)
    expected = run_theirs(theirs[0], noise, "pil", **steps)
    measured("SANA with PAG", "pictures, of 255", picture_error(run_ours(ours, noise, "pil", **steps), expected), 2)
    assert picture_error(run_ours(ours, noise, "pil", **steps, pag_scale=0.01), expected) > 2


@pytest.mark.parametrize("num_steps,grid", [(1, (2, 6)), (20, (6, 2))])
def test_other_steps_and_sizes_are_those_of_diffusers(theirs, ours, num_steps, grid, measured):
    noise = np.asarray(initial_noise(0, np.arange(2), (*grid, 8)))
    expected = run_theirs(theirs[0], noise, num_inference_steps=num_steps)
    measured(*LATENTS, relative_error(run_ours(ours, noise, num_inference_steps=num_steps), expected), 1e-3)


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
    measured(*LATENTS, relative_error(run_ours(ours, noise, **strength, pag_layers=layers), expected), 1e-3)
    # Another block, and a strength that does not fade.
    assert relative_error(run_ours(ours, noise, **strength, pag_layers=(1,)), expected) > 1e-3
    if adaptive:
        assert relative_error(run_ours(ours, noise, **strength | {"pag_adaptive_scale": 0.0}), expected) > 1e-3


class WithNorms:
    """What diffusers' PAG processors would be with the norms of q and k kept in the normal branches."""

    def __init__(self, branches):
        self.branches = branches

    def __call__(self, attn, hidden_states, **kwargs):
        *normal, perturbed = hidden_states.chunk(self.branches)
        normal = SanaLinearAttnProcessor2_0()(attn, torch.cat(normal))
        return torch.cat([normal, attn.to_out[0](attn.to_v(perturbed))])


def test_models_with_qk_norm_keep_it_where_diffusers_drops_it(tmp_path, noise, measured):
    """In the perturbed block diffusers leaves the norms out of the normal branches too; ours are the model's own."""
    options = {"num_layers": 2, "qk_norm": "rms_norm_across_heads"}
    theirs = save_tiny(diffusers.SanaPAGPipeline, tmp_path, transformer=options, own=OWN)
    ours = run_ours(SanaPipeline.from_pretrained(tmp_path), noise)
    assert relative_error(ours, run_theirs(theirs, noise)) > 1e-2
    theirs.set_pag_applied_layers("transformer_blocks.0", (WithNorms(3), WithNorms(2)))
    error = relative_error(ours, run_theirs(theirs, noise))
    measured("SANA-1.5 with PAG", "final latents, q and k norms kept", error, 1e-3)


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
