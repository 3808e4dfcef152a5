"""Distillation: a student that begins as its teacher, is drawn from in few steps, and goes on as it would have."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_run

from configs import base
from sana_jax import SanaPipeline
from sana_jax.training import loop
from sana_jax.weights import folder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_quickly")]

TEACHER = dataclasses.replace(tiny_run.TRANSFORMER, timestep_scale=0.001, integer_timesteps=False)
STUDENT = dataclasses.replace(TEACHER, guidance_embeds=True)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A run's folder with a flow model of continuous time."""
    path = tmp_path_factory.mktemp("teacher") / "run"
    config = tiny_run.config(data / "pictures", data / "vae")
    with config.unlocked():
        config.model = base.fields(TEACHER)
    config.train.num_steps, config.train.sample_every = 2, 0
    loop.train(config, str(path))
    return path


@pytest.fixture
def config(config, teacher):
    with config.unlocked():
        config.model = base.fields(STUDENT)
    config.text_encoder.mode, config.text_encoder.path = "frozen", str(teacher)
    config.distillation.teacher = str(teacher)
    config.distillation.critic_blocks = (0, 1)
    config.distillation.tangent_warmup = 2
    return config


def assert_equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_student_is_exported_as_a_sprint_model_that_draws_in_its_steps(config, tmp_path):
    state = loop.train(config, str(tmp_path))
    assert set(state.params) == {"transformer", "log_variance", "critic"}
    for line in tiny_run.logs(tmp_path):
        assert {"consistency", "tangent_rms", "generator", "critic"} <= set(line)
    pipe = SanaPipeline.from_pretrained(tmp_path)
    assert pipe.defaults.family == "sprint"
    assert_equal(
        jax.tree.map(np.asarray, folder.load_transformer(tmp_path)[1]), jax.device_get(state.averaged())["transformer"]
    )
    images = pipe(["a cat"], height=16, width=16, guidance_scale=4.5, output_type="np")
    assert np.isfinite(images).all()
    assert (tmp_path / "samples").is_dir()


def test_a_student_begins_as_its_teacher_and_without_a_critic_becomes_more_consistent(config, teacher, tmp_path):
    config.distillation.adversarial_weight = 0.0
    config.distillation.critic_blocks = (2, 8, 14, 19)
    config.train.num_steps = 0
    start = jax.device_get(loop.train(config, str(tmp_path / "start")).params)
    before = folder.load_transformer(teacher)[1]
    assert set(start["transformer"]) == {*before, "guidance_embed"}
    assert_equal({name: start["transformer"][name] for name in before}, jax.tree.map(np.asarray, before))
    assert not np.any(start["transformer"]["guidance_embed"]["linear_2"]["kernel"])
    config.train.num_steps = config.train.checkpoint_every = 60
    config.train.sample_every = 30
    config.optimizer.learning_rate = 3e-3
    loop.train(config, str(tmp_path / "run"))
    heldout = [line["all_loss"] for line in tiny_run.metrics(tmp_path / "run") if "all_loss" in line]
    assert heldout[-1] < 0.9 * heldout[0]


def test_a_resumed_distillation_equals_an_uninterrupted_one_bit_for_bit(config, tmp_path):
    config.train.sample_every = 0
    wanted = loop.train(config, str(tmp_path / "whole"))
    config.train.num_steps = 2
    loop.train(config, str(tmp_path / "parts"))
    config.train.num_steps = 4
    assert_equal(jax.device_get(loop.train(config, str(tmp_path / "parts"))), jax.device_get(wanted))


def test_a_student_does_not_go_on_with_another_teacher(config, teacher, tmp_path):
    config.train.num_steps = config.train.checkpoint_every = 2
    config.train.sample_every = 0
    loop.train(config, str(tmp_path / "student"))
    other, params = folder.load_transformer(teacher)
    params["proj_out"]["bias"] = params["proj_out"]["bias"] + 1
    folder.save_transformer(other, params, tmp_path / "other")
    config.distillation.teacher, config.train.num_steps = str(tmp_path / "other"), 4
    with pytest.raises(ValueError, match=r"weights of teacher are not .* Restore them \(config.distillation.teacher\)"):
        loop.train(config, str(tmp_path / "student"))


def test_another_model_as_teacher_is_told_before_latents_are_computed(config, tmp_path):
    config.train.cache_latents = True
    config.model.num_layers = 3
    with pytest.raises(
        ValueError, match="another model: num_layers .config 3, weights 2.* A teacher is config.model without"
    ):
        loop.train(config, str(tmp_path))
    assert not (tmp_path / "latents").exists()


def test_a_model_starts_from_weights_of_other_timesteps_and_without_norms_where_it_is_asked_to(data, teacher, tmp_path):
    """As SANA-Sprint's teachers do."""
    config = tiny_run.config(data / "pictures", data / "vae")
    config.init_from, config.train.num_steps = str(teacher), 0
    config.model.qk_norm = True
    differing = "qk_norm .config True, weights False.*timestep_scale .config 1.0, weights 0.001"
    with pytest.raises(ValueError, match=f"{differing}.*integer_timesteps"):
        loop.train(config, str(tmp_path / "refused"))
    with pytest.raises(ValueError, match=r"init_adapts=\('qk_norm', 'timestep_scale', 'integer_timesteps'\)"):
        loop.train(config, str(tmp_path / "refused"))
    config.init_adapts = ("timestep_scale", "integer_timesteps", "qk_norm")
    state = jax.device_get(loop.train(config, str(tmp_path / "run")))
    before = folder.load_transformer(teacher)[1]
    assert_equal(state.params["transformer"]["time_embed"], jax.tree.map(np.asarray, before["time_embed"]))
    assert np.all(state.params["transformer"]["blocks"]["self_attention"]["norm_q"]["scale"] == 1)
    config.model.qk_norm = False
    config.init_from = str(tmp_path / "run")
    with pytest.raises(ValueError, match="another model: qk_norm .config False, weights True"):
        loop.train(config, str(tmp_path / "back"))


def test_captions_that_the_teacher_was_not_trained_with_are_told(config, tmp_path, caplog):
    config.train.num_steps, config.text_encoder.lower_case, config.sample.num_inference_steps = 0, False, 20
    loop.train(config, str(tmp_path))
    assert "is given other captions or latents" in caplog.text and "lower_case True -> False" in caplog.text
    assert "in sample.num_inference_steps=20 steps; SANA-Sprint takes 1 to 4" in caplog.text


def test_a_student_goes_on_in_a_new_run_and_is_no_teacher(config, tmp_path, caplog):
    config.train.num_steps, config.train.sample_every = 1, 0
    first = jax.device_get(loop.train(config, str(tmp_path / "first")).averaged())
    config.init_from, config.train.num_steps = str(tmp_path / "first"), 0
    with caplog.at_level("INFO"):
        second = jax.device_get(loop.train(config, str(tmp_path / "second")).params)
    assert_equal(second["transformer"], first["transformer"])
    assert "critic and variance start anew" in caplog.text
    config.distillation.teacher = str(tmp_path / "first")
    with pytest.raises(ValueError, match="is a SANA-Sprint itself, and a teacher takes no guidance scale"):
        loop.train(config, str(tmp_path / "third"))
