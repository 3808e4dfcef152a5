"""The whole pipeline against diffusers' SanaPipeline: folders both ways, latents and pictures from the same noise."""

import numpy as np
import pytest

from sana_jax import SanaPipeline
from sana_jax.diffusion.noise import initial_noise
from sana_jax.weights.model_index import EMBEDDED_MODEL

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from parity_errors import picture_error, relative_error
from tiny_diffusers import allow_any_size, draw, save_tiny

INSTRUCTION = ["the quick brown fox:", "User Prompt: "]
LENGTH = 12
PROMPTS = ["A red apple on a blue background", "pear"]
NEGATIVES = ["blurry", "a flat yellow star"]
SIZES = {"square": (16, 16), "wide": (8, 24), "tall": (24, 8)}
LATENTS = ("SANA pipeline", "final latents, 1 to 20 steps, CFG, negative prompts, three sizes")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A SanaPipeline with random non-zero values in every parameter, and the folder it saved itself to."""
    path = tmp_path_factory.mktemp("diffusers")
    own = {"complex_human_instruction": INSTRUCTION, "max_sequence_length": LENGTH}
    pipe = save_tiny(diffusers.SanaPipeline, path, own=own)
    return pipe, path


def noise_of(size, batch=2):
    height, width = SIZES[size]
    return np.asarray(initial_noise(0, np.arange(batch), (height // 4, width // 4, 8)))


def run_theirs(pipe, noise, output_type, prompts=PROMPTS, **kwargs):
    arguments = dict(num_inference_steps=5, guidance_scale=3.0, negative_prompt=NEGATIVES)
    text = dict(max_sequence_length=LENGTH, complex_human_instruction=INSTRUCTION)
    return draw(pipe, prompts, noise, output_type, **{**arguments, **text, **kwargs})


def run_ours(pipe, noise, output_type, **kwargs):
    height, width = (4 * side for side in noise.shape[1:3])
    arguments = dict(num_inference_steps=5, guidance_scale=3.0, negative_prompt=NEGATIVES, height=height, width=width)
    return pipe(PROMPTS, latents=noise, output_type=output_type, **{**arguments, **kwargs})


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    allow_any_size(monkeypatch, diffusers.SanaPipeline)


@pytest.mark.parametrize("num_steps,size", [(1, "tall"), (2, "wide"), (5, "square"), (20, "square")])
def test_final_latents_equal_diffusers(num_steps, size, theirs, ours, measured):
    noise = noise_of(size)
    expected = run_theirs(theirs[0], noise, "latent", num_inference_steps=num_steps)
    latents = run_ours(ours, noise, "latent", num_inference_steps=num_steps)
    measured(*LATENTS, relative_error(latents, expected), 1e-3)


@pytest.mark.parametrize("num_steps,size", [(5, "square"), (20, "wide")])
def test_pictures_equal_diffusers_within_2_of_255(num_steps, size, theirs, ours, measured):
    noise = noise_of(size)
    expected = run_theirs(theirs[0], noise, "pil", num_inference_steps=num_steps)
    pictures = run_ours(ours, noise, "pil", num_inference_steps=num_steps)
    measured("SANA pipeline", "pictures, of 255", picture_error(pictures, expected), 2)


def test_latents_without_guidance_equal_diffusers(theirs, ours, noise, measured):
    expected = run_theirs(theirs[0], noise, "latent", guidance_scale=1.0)
    measured(*LATENTS, relative_error(run_ours(ours, noise, "latent", guidance_scale=1.0), expected), 1e-3)


def test_exchanging_the_negative_prompts_breaks_parity(theirs, ours, noise):
    exchanged = run_ours(ours, noise, "latent", negative_prompt=NEGATIVES[::-1])
    assert relative_error(exchanged, run_theirs(theirs[0], noise, "latent")) > 1e-2


def test_several_pictures_for_several_prompts_equal_diffusers_for_each_prompt_alone(theirs, ours, measured):
    """All at once, diffusers repeats masks in another order than features: pictures then see another prompt's mask."""
    noise, several = noise_of("square", 4), dict(num_images_per_prompt=2)
    alone = [
        run_theirs(theirs[0], noise[2 * i :][:2], "latent", [prompt], negative_prompt=negative, **several)
        for i, (prompt, negative) in enumerate(zip(PROMPTS, NEGATIVES, strict=True))
    ]
    alone = np.concatenate(alone)
    measured(*LATENTS, relative_error(run_ours(ours, noise, "latent", **several), alone), 1e-3)
    assert relative_error(run_theirs(theirs[0], noise, "latent", **several), alone) > 1e-2


class ScaleOfStep:
    """A guidance scale that diffusers multiplies with once in every step."""

    def __init__(self, scales):
        self.left = list(scales)

    def __gt__(self, other):
        return True

    def __mul__(self, difference):
        return self.left.pop(0) * difference


def test_the_guidance_interval_is_diffusers_with_a_scale_of_1_outside(theirs, ours, noise, measured):
    scales = ScaleOfStep([1.0, 1.0, 3.0, 3.0, 1.0])  # timesteps 999 922 817 666 428
    expected = run_theirs(theirs[0], noise, "latent", guidance_scale=scales)
    assert not scales.left
    latents = run_ours(ours, noise, "latent", guidance_interval=(0.5, 0.9))
    measured(*LATENTS, relative_error(latents, expected), 1e-3)
    assert relative_error(run_ours(ours, noise, "latent"), expected) > 1e-2


def test_a_folder_of_ours_opens_in_diffusers_and_gives_the_same_latents(theirs, ours, noise, tmp_path):
    ours.save_pretrained(tmp_path)
    again = diffusers.SanaPipeline.from_pretrained(tmp_path, text_encoder=None, local_files_only=True)
    text_encoder = transformers.Gemma2Model.from_pretrained(tmp_path / "text_encoder", attn_implementation="eager")
    again.register_modules(text_encoder=text_encoder)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler).__name__ == "DPMSolverMultistepScheduler"
    np.testing.assert_allclose(run_theirs(again, noise, "latent"), run_theirs(theirs[0], noise, "latent"), atol=1e-5)


def test_the_whole_folder_of_ours_opens_in_diffusers_as_it_is(ours, tmp_path):
    ours.save_pretrained(tmp_path, dtype="float16")
    again = diffusers.SanaPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32, local_files_only=True)
    parts = {name: type(part).__name__ for name, part in again.components.items()}
    assert parts["text_encoder"] == "Gemma2Model" and parts["vae"] == "AutoencoderDC"
    assert again.tokenizer("a red apple").input_ids == ours.tokenizer.encode("a red apple").ids


def test_the_embedded_model_gives_the_same_pictures_in_diffusers(measured):
    folder, prompts = EMBEDDED_MODEL, ["a red apple, noto style, on a blue background", "a cat, twemoji style"]
    again = diffusers.SanaPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    embedded = SanaPipeline.from_pretrained()
    noise = np.random.default_rng(0).normal(size=(2, *embedded.latent_shape(64, 64))).astype(np.float32)
    arguments = dict(num_inference_steps=20, guidance_scale=3.0)
    text = dict(complex_human_instruction=None, max_sequence_length=embedded.defaults.max_sequence_length)
    expected = draw(again, prompts, noise, "pil", **arguments, **text)
    pictures = embedded(prompts, latents=noise, **arguments)
    measured("embedded model", "pictures, of 255", picture_error(pictures, expected), 2)


def test_swapping_query_and_key_of_one_layer_breaks_parity(theirs, ours, noise, monkeypatch):
    qkv = ours.params["transformer"]["blocks"]["0"]["self_attention"]["qkv"]
    monkeypatch.setitem(qkv, "kernel", qkv["kernel"][:, np.array([1, 0, 2])])
    assert relative_error(run_ours(ours, noise, "latent"), run_theirs(theirs[0], noise, "latent")) > 1e-3


def test_mirroring_the_first_convolution_of_the_decoder_breaks_the_pictures(theirs, ours, noise, monkeypatch):
    conv_in = ours.params["autoencoder"]["decoder"]["conv_in"]
    monkeypatch.setitem(conv_in, "kernel", conv_in["kernel"][::-1])
    assert picture_error(run_ours(ours, noise, "pil"), run_theirs(theirs[0], noise, "pil")) > 2
