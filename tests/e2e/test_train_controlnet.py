"""Training a ControlNet: only its copies change, its folder is one that samplers read, and runs go on as they would have."""

import shutil

import jax
import numpy as np
import pytest
import tiny_run
from PIL import Image

from sana_jax import SanaPipeline
from sana_jax.data import folder_build
from sana_jax.training import loop
from sana_jax.weights import parts

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    path = tmp_path_factory.mktemp("guided") / "pictures"
    tiny_run.write_photographs(path, [(16, 16)] * 12, control=True)
    return path


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    """A run's folder with a pipeline to start from."""
    path = tmp_path_factory.mktemp("model") / "run"
    config = tiny_run.config(data / "pictures", data / "vae")
    config.train.num_steps, config.train.sample_every = 2, 0
    loop.train(config, str(path))
    return path


@pytest.fixture
def config(config, model, guided):
    config.init_from = config.text_encoder.path = str(model)
    config.text_encoder.mode = "frozen"
    config.controlnet.num_layers = 1
    config.controlnet.wiring = "original"
    config.data.path = str(guided)
    return config


def test_a_run_exports_a_controlnet_with_which_the_model_draws(config, model, tmp_path):
    config.optimizer.learning_rate = 0.03
    state = loop.train(config, str(tmp_path))
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["controlnet"]
    shown = Image.open(max((tmp_path / "samples").iterdir()))
    assert shown.size[0] // shown.size[1] == 8, "four pictures, each after the one that guides it"
    pipe = SanaPipeline.from_pretrained(model, controlnet=tmp_path)
    assert pipe.controlnet.config.wiring == "original"
    wanted = jax.device_get(state.averaged())["controlnet"]
    found = parts.read(parts.find(parts.CONTROLNET, tmp_path))[1]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    call = dict(height=16, width=16, num_inference_steps=2, output_type="np")
    rng = np.random.default_rng(0)
    one, other = (pipe("a cat", control_image=rng.random((1, 16, 16, 3), np.float32), **call) for _ in range(2))
    assert np.isfinite(one).all() and np.abs(one - other).max() > 1e-3, "what guides is seen"


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(config, tmp_path):
    config.train.sample_every = 0
    wanted = loop.train(config, str(tmp_path / "whole"))
    config.train.num_steps = 2
    loop.train(config, str(tmp_path / "parts"))
    config.train.num_steps, config.controlnet.init_from = 4, "/gone"  # what it started from is not read again
    found = loop.train(config, str(tmp_path / "parts"))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))


def test_a_run_does_not_go_on_with_the_same_pictures_guided_by_others(config, tmp_path, guided):
    config.train.num_steps = config.train.checkpoint_every = 1
    config.train.sample_every = 0
    loop.train(config, str(tmp_path / "run"))
    files = tmp_path / "files"
    shutil.copytree(guided.with_name("pictures_files"), files)
    shutil.copyfile(files / "00.control.png", files / "01.control.png")
    folder_build.build(files, tmp_path / "others", control=True)
    config.data.path, config.train.num_steps = str(tmp_path / "others"), 2
    with pytest.raises(ValueError, match="has the pictures that the run so far was trained on, guided by others"):
        loop.train(config, str(tmp_path / "run"))


def test_cached_latents_of_both_give_the_losses_of_pictures_encoded_in_the_step(config, tmp_path):
    config.train.sample_every, config.optimizer.learning_rate = 0, 0.03
    for cached in (False, True):
        config.train.cache_latents = cached
        loop.train(config, str(tmp_path / str(cached)))
    found, wanted = (list(tiny_run.losses(tmp_path / str(cached)).values()) for cached in (True, False))
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_the_first_loss_is_that_of_the_model_alone(config, tmp_path):
    config.train.num_steps, config.train.sample_every = 1, 0
    loop.train(config, str(tmp_path / "guided"))
    config.controlnet.num_layers, config.controlnet.wiring = 0, "diffusers"
    loop.train(config, str(tmp_path / "whole"))
    guided, whole = tiny_run.losses(tmp_path / "guided"), tiny_run.losses(tmp_path / "whole")
    assert guided[1] == pytest.approx(whole[1], rel=1e-5)
