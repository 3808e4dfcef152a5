"""The whole pipeline against diffusers' SanaPipeline: folders both ways, latents and pictures from the same noise."""

import jax
import numpy as np
import pytest

from sana_jax import SanaPipeline
from sana_jax.pipeline import initial_noise
from sana_jax.weights.model_index import EMBEDDED_MODEL

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from tiny_diffusers import save_tiny

INSTRUCTION = ["the quick brown fox:", "User Prompt: "]
LENGTH = 12
PROMPTS = ["A red apple on a blue background", "pear"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A SanaPipeline with random non-zero values in every parameter, and the folder it saved itself to."""
    path = tmp_path_factory.mktemp("diffusers")
    own = {"complex_human_instruction": INSTRUCTION, "max_sequence_length": LENGTH}
    pipe = save_tiny(diffusers.SanaPipeline, path, own=own)
    return pipe, path


@pytest.fixture(scope="module")
def ours(theirs):
    return SanaPipeline.from_pretrained(theirs[1])


@pytest.fixture(scope="module")
def noise():
    return np.asarray(initial_noise(0, np.arange(2), (4, 4, 8)))


def run_theirs(pipe, noise, output_type, prompts=PROMPTS, **kwargs):
    arguments = dict(num_inference_steps=6, guidance_scale=3.0, negative_prompt="blurry", height=16, width=16)
    out = pipe(
        prompts,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type=output_type,
        use_resolution_binning=False,
        max_sequence_length=LENGTH,
        complex_human_instruction=INSTRUCTION,
        **{**arguments, **kwargs},
    ).images
    return out.numpy().transpose(0, 2, 3, 1) if output_type == "latent" else out


def run_ours(pipe, noise, output_type, prompts=PROMPTS, **kwargs):
    arguments = dict(num_inference_steps=6, guidance_scale=3.0, negative_prompt="blurry")
    return pipe(prompts, latents=noise, output_type=output_type, **{**arguments, **kwargs})


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.fixture(autouse=True)
def divisible_by_4(monkeypatch):
    """diffusers insists on multiples of 32 pixels, whatever the autoencoder's factor."""
    monkeypatch.setattr(diffusers.SanaPipeline, "check_inputs", lambda *args, **kwargs: None)


@pytest.mark.parametrize(("steps", "size"), [(1, (16, 16)), (6, (16, 16)), (20, (16, 16)), (2, (8, 24))])
def test_final_latents_equal_diffusers(theirs, ours, noise, steps, size, measured):
    noise = np.resize(noise, (2, size[0] // 4, size[1] // 4, 8))
    settings = dict(num_inference_steps=steps, height=size[0], width=size[1])
    expected = run_theirs(theirs[0], noise, "latent", **settings)
    error = relative(run_ours(ours, noise, "latent", **settings), expected)
    measured("SANA pipeline", "final latents, 1 to 20 steps, CFG, negative prompt, two sizes", error, 1e-3)


def test_a_batch_of_prompts_has_its_pictures_side_by_side(theirs, ours):
    """Where diffusers mixes the prompts of a batch up, it is asked for one prompt at a time."""
    noise = np.asarray(initial_noise(1, np.arange(4), (4, 4, 8)))
    found = run_ours(ours, noise, "latent", num_images_per_prompt=2)
    for number, prompt in enumerate(PROMPTS):
        own = noise[2 * number : 2 * number + 2]
        expected = run_theirs(theirs[0], own, "latent", prompt, num_images_per_prompt=2)
        assert relative(found[2 * number : 2 * number + 2], expected) < 1e-3


def test_pictures_equal_diffusers_within_2_of_255(theirs, ours, noise, measured):
    expected = [np.asarray(picture, np.int16) for picture in run_theirs(theirs[0], noise, "pil")]
    pictures = [np.asarray(picture, np.int16) for picture in run_ours(ours, noise, "pil")]
    error = np.abs(np.stack(pictures) - np.stack(expected)).max()
    measured("SANA pipeline", "pictures, of 255", error, 2)
    assert np.stack(expected).std() > 5  # not a grey surface


def test_latents_without_guidance_equal_diffusers(theirs, ours, noise):
    expected = run_theirs(theirs[0], noise, "latent", guidance_scale=1.0)
    assert relative(run_ours(ours, noise, "latent", guidance_scale=1.0), expected) < 1e-3


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


def test_the_embedded_model_gives_the_same_pictures_in_diffusers():
    folder, prompts = EMBEDDED_MODEL, ["a red apple, noto style, on a blue background", "a cat, twemoji style"]
    again = diffusers.SanaPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    embedded = SanaPipeline.from_pretrained()
    noise = np.random.default_rng(0).normal(size=(2, *embedded.latent_shape(64, 64))).astype(np.float32)
    length = embedded.defaults.max_sequence_length
    expected = again(
        prompts,
        height=64,
        width=64,
        num_inference_steps=20,
        guidance_scale=3.0,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        use_resolution_binning=False,
        complex_human_instruction=None,
        max_sequence_length=length,
    ).images
    pictures = embedded(prompts, guidance_scale=3.0, num_inference_steps=20, latents=noise)
    difference = np.abs(np.stack(pictures).astype(np.int16) - np.stack(expected).astype(np.int16))
    assert difference.max() <= 3 and np.stack(pictures).std() > 20


def test_swapping_query_and_key_of_one_layer_breaks_parity(theirs, ours, noise):
    expected = run_theirs(theirs[0], noise, "latent")
    mutated = SanaPipeline.from_pretrained(theirs[1])
    kernel = mutated.params["transformer"]["blocks"]["self_attention"]["qkv"]["kernel"]
    mutated.params["transformer"]["blocks"]["self_attention"]["qkv"]["kernel"] = kernel.at[0].set(
        kernel[0][:, jax.numpy.array([1, 0, 2])]
    )
    assert relative(run_ours(mutated, noise, "latent"), expected) > 1e-3
