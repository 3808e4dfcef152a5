"""SANA-Sprint through the pipeline: what is sampled, what is written, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipeline import tiny_parts, tiny_sprint_parts

from sana_jax import SanaPipeline, load_transformer
from sana_jax.diffusion.noise import initial_noise
from sana_jax.diffusion.trigflow import step_noise
from sana_jax.prompts import tokenize_prompts
from sana_jax.weights import folder, model_index


@pytest.fixture(scope="module")
def pipe():
    return SanaPipeline(tiny_sprint_parts())


@pytest.fixture
def written(tmp_path):
    folder.save_pipeline(tmp_path, **tiny_sprint_parts()._asdict())
    return tmp_path


def latents_of(pipe, *args, **kwargs):
    return pipe(*args, output_type="latent", **kwargs)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_latents_are_two_steps_of_the_model_written_out(pipe):
    parts = tiny_sprint_parts()
    model = jax.jit(lambda params, *inputs: parts.transformer[0].apply({"params": params}, *inputs))
    ids, mask = tokenize_prompts(parts.tokenizer, ["a red apple"], None, 12)
    encode = jax.jit(lambda params, *inputs: parts.text_encoder[0].apply({"params": params}, *inputs))
    features = encode(parts.text_encoder[1], ids, mask)
    x = initial_noise(5, np.arange(1), (4, 4, 8))
    sigmas = [1.0, np.sin(1.3) / (np.sin(1.3) + np.cos(1.3))]
    for sigma, z in zip(sigmas, (step_noise(5, np.arange(1), 2, (4, 4, 8))[0], None), strict=True):
        timesteps, guidance = jnp.full((1,), 1000 * sigma, jnp.float32), jnp.full((1,), 3.0, jnp.float32)
        x = x - sigma * model(parts.transformer[1], x, timesteps, features, mask, guidance)
        x = x if z is None else (1 - sigmas[1]) * x + sigmas[1] * z
    np.testing.assert_allclose(latents_of(pipe, "A red apple", guidance_scale=3.0, seed=5), x, rtol=1e-4, atol=1e-4)


def test_a_batch_is_its_pictures_drawn_alone_with_the_noise_of_each_step(pipe):
    batch = latents_of(pipe, ["a red apple", "a green pear"], seed=4, num_inference_steps=4)
    noise = initial_noise(4, np.array([1]), (4, 4, 8))
    between = step_noise(4, np.array([1]), 4, (4, 4, 8))
    alone = latents_of(pipe, "a green pear", latents=noise, step_noise=between, num_inference_steps=4)
    np.testing.assert_allclose(batch[1:], alone, rtol=1e-4, atol=1e-5)


def test_prompt_seed_guidance_step_noise_and_angles_matter(pipe):
    plain = latents_of(pipe, "a red apple")
    np.testing.assert_array_equal(plain, latents_of(pipe, "a red apple"))
    np.testing.assert_array_equal(plain, latents_of(pipe, "a red apple", timesteps=(1.57080, 1.3, 0.0)))
    for changed in (
        latents_of(pipe, "a green pear"),
        latents_of(pipe, "a red apple", seed=1),
        latents_of(pipe, "a red apple", guidance_scale=1.0),
        latents_of(pipe, "a red apple", step_noise=np.zeros((1, 1, 4, 4, 8), np.float32)),
        latents_of(pipe, "a red apple", timesteps=(1.57080, 1.0, 0.0)),
    ):
        assert np.abs(changed - plain).max() > 1e-3


def test_one_program_serves_every_prompt_seed_and_guidance_scale(pipe):
    latents_of(pipe, "a red apple")
    programs = len(pipe.programs)
    latents_of(pipe, "fox", seed=1, guidance_scale=1.0)
    assert len(pipe.programs) == programs


def test_a_saved_sprint_is_read_as_one(pipe, written):
    index = json.loads((written / "model_index.json").read_text())
    assert index["_class_name"] == "SanaSprintPipeline" and index["scheduler"] == ["diffusers", "SCMScheduler"]
    parts = folder.read_pipeline(folder.find_pipeline(written))
    assert parts.defaults == pipe.defaults and parts.defaults.family == "sprint"
    assert parts.transformer[0] == pipe.transformer


def test_a_public_sprint_folder_has_the_public_defaults(written):
    (written / "sana_jax.json").unlink()
    edit(written / "scheduler" / "scheduler_config.json", max_timesteps=1.57080, intermediate_timesteps=1.3)
    defaults = folder.load_defaults(written)
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.solver) == (2, 4.5, "scm")
    assert defaults.complex_human_instruction[-1] == "User Prompt: "


def test_a_sprint_of_the_public_conversion_has_continuous_time(pipe, written):
    """Its config.json leaves timestep_scale at 1; the embedding sees the level itself with either scale."""
    edit(written / "transformer" / "config.json", timestep_scale=1.0)
    assert not load_transformer(written)[0].config.integer_timesteps
    unscaled = SanaPipeline.from_pretrained(written)
    np.testing.assert_allclose(latents_of(unscaled, "fox"), latents_of(pipe, "fox"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(negative_prompt="blurry"), "negative prompt 'blurry': a SANA-Sprint model has its guidance built in"),
        (dict(solver="flow_dpm"), "solver flow_dpm does not fit this SANA-Sprint model; use scm"),
        (dict(guidance_interval=(0.0, 0.5)), r"guidance_interval=\(0.0, 0.5\): a SANA-Sprint model has its guidance"),
        (dict(timesteps=(1.5, 1.0)), r"timesteps=\(1.5, 1.0\) are not the angles of TrigFlow"),
        (
            dict(timesteps=(1.5, 1.0, 0.0), num_inference_steps=4),
            "3 timesteps are of 2 steps and num_inference_steps=4",
        ),
        (
            dict(step_noise=np.zeros((2, 1, 4, 4, 8), np.float32)),
            r"step_noise has the shape \(2, .*needs \(1, 1, 4, 4, 8\)",
        ),
        (dict(num_inference_steps=0), "steps 0: at least 1"),
    ],
)
def test_an_argument_that_sprint_cannot_use_is_named(pipe, arguments, message, monkeypatch):
    monkeypatch.setattr(pipe, "programs", None)
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "fox", **arguments})


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(solver="scm"), "solver scm does not fit this SANA model; use flow_dpm or flow_euler"),
        (dict(timesteps=(1.5, 0.0)), "timesteps is for SANA-Sprint models, and this is a SANA model"),
        (dict(step_noise=np.zeros((2, 1, 4, 4, 8), np.float32)), "step_noise is for SANA-Sprint models"),
    ],
)
def test_sprints_arguments_are_refused_by_a_sana(arguments, message):
    with pytest.raises(ValueError, match=message):
        SanaPipeline(tiny_parts())("fox", **arguments)


def test_scheduler_settings_that_are_not_implemented_are_named(written):
    for changes, message in (
        (dict(sigma_data=1.0), "has sigma_data=1.0; the solvers here implement 0.5 only"),
        (dict(sigma_data=0.5, prediction_type="epsilon"), "has prediction_type='epsilon'"),
        (dict(prediction_type="trigflow", intermediate_timesteps=1.1), "has intermediate_timesteps=1.1"),
    ):
        edit(written / "scheduler" / "scheduler_config.json", **changes)
        with pytest.raises(ValueError, match=message):
            folder.load_defaults(written)


def test_a_family_and_a_scheduler_that_do_not_fit_are_named(written):
    edit(written / "model_index.json", _class_name="SanaPipeline")
    with pytest.raises(
        ValueError, match="is of the solver scm, which the SanaPipeline of model_index.json is not sampled"
    ):
        folder.load_defaults(written)
    edit(written / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ValueError, match="is of a FluxPipeline; implemented are SanaPipeline, .*SanaSprintPipeline"):
        model_index.pipeline_family(written)


def test_a_transformer_of_the_other_family_is_named(tmp_path):
    parts = tiny_sprint_parts()._replace(transformer=tiny_parts().transformer)
    folder.save_pipeline(tmp_path, **parts._asdict())
    with pytest.raises(ValueError, match="has guidance_embeds=False, and a SanaSprintPipeline needs True"):
        folder.read_pipeline(folder.find_pipeline(tmp_path))


def test_the_img2img_pipelines_folder_is_a_sprint(written):
    edit(written / "model_index.json", _class_name="SanaSprintImg2ImgPipeline")
    assert folder.load_defaults(written).family == "sprint"
