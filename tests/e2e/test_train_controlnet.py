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
    return adapted(config, model, guided)


def adapted(config, model, guided):
    """The config of a run that trains a ControlNet of the model."""
    config.init_from = config.text_encoder.path = str(model)
    config.text_encoder.mode = "frozen"
    config.controlnet.num_layers = 1
    config.controlnet.wiring = "original"
    config.data.path = str(guided)
    config.optimizer.learning_rate = 0.03
    return config


@pytest.fixture(scope="module")
def run(data, model, guided, tmp_path_factory):
    """A whole run: its folder, and what it ended with."""
    path = tmp_path_factory.mktemp("controlnet") / "run"
    return path, loop.train(adapted(tiny_run.config(data / "pictures", data / "vae"), model, guided), str(path))


def test_a_run_exports_a_controlnet_with_which_the_model_draws(run, model):
    path, state = run
    assert [entry.name for entry in (path / "export").iterdir()] == ["controlnet"]
    shown = Image.open(max((path / "samples").iterdir()))
    assert shown.size[0] // shown.size[1] == 8, "four pictures, each after the one that guides it"
    pipe = SanaPipeline.from_pretrained(model, controlnet=path)
    assert pipe.controlnet.config.wiring == "original"
    wanted = jax.device_get(state.averaged())["controlnet"]
    found = parts.read(parts.find(parts.CONTROLNET, path))[1]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    call = dict(height=16, width=16, num_inference_steps=2, output_type="np")
    rng = np.random.default_rng(0)
    one, other = (pipe("a cat", control_image=rng.random((1, 16, 16, 3), np.float32), **call) for _ in range(2))
    assert np.isfinite(one).all() and np.abs(one - other).max() > 1e-3, "what guides is seen"


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, config, tmp_path):
    config.train.num_steps, config.train.sample_every = 2, 0
    loop.train(config, str(tmp_path))
    config.train.num_steps, config.controlnet.init_from = 4, "/gone"  # what it started from is not read again
    found = loop.train(config, str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(run[1]))


def test_a_run_does_not_go_on_with_the_same_pictures_guided_by_others(run, config, tmp_path, guided):
    shutil.copytree(run[0], tmp_path / "run")
    files = tmp_path / "files"
    shutil.copytree(guided.with_name("pictures_files"), files)
    shutil.copyfile(files / "00.control.png", files / "01.control.png")
    folder_build.build(files, tmp_path / "others", control=True)
    config.data.path, config.train.num_steps = str(tmp_path / "others"), 6
    with pytest.raises(ValueError, match="has the pictures that the run so far was trained on, guided by others"):
        loop.train(config, str(tmp_path / "run"))


def test_cached_latents_of_both_give_the_losses_of_pictures_encoded_in_the_step(run, config, tmp_path):
    config.train.sample_every, config.train.cache_latents = 0, True
    loop.train(config, str(tmp_path))
    found, wanted = (list(tiny_run.losses(path).values()) for path in (tmp_path, run[0]))
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
