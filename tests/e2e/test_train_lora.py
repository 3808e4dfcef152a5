"""Training a LoRA: only the factors change, the file is one that samplers read, and runs go on as they would have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_run

from sana_jax import SanaPipeline
from sana_jax.training import loop, lora
from sana_jax.weights import folder, parts
from sana_jax.weights import lora as files

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    """A run's folder with a pipeline to start from."""
    path = tmp_path_factory.mktemp("model") / "run"
    config = tiny_run.config(data / "pictures", data / "vae")
    config.train.num_steps, config.train.sample_every = 2, 0
    loop.train(config, str(path))
    return path


@pytest.fixture
def config(config, model):
    config.init_from = str(model)
    config.text_encoder.mode, config.text_encoder.path = "frozen", str(model)
    config.lora.rank = 2
    config.lora.scale = 0.5
    config.lora.layers = (*config.lora.layers, "feed_forward/expand", "feed_forward/project")
    return config


def transformer(path, **given):
    source = folder.find_pipeline(path, **given).transformer
    return parts.read(source)[1]


def assert_equal(found, wanted, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, wanted)


def test_the_file_makes_of_the_model_what_was_trained(config, model, tmp_path):
    config.optimizer.learning_rate = 0.03
    before = transformer(model)
    state = loop.train(config, str(tmp_path))
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert_equal(transformer(model), before, rtol=0)
    trained = jax.device_get(state.averaged())["transformer"]
    found = transformer(model, lora=files.open_lora(tmp_path))  # the run's own folder
    module = folder.load_transformer(model)[0]
    rng = np.random.default_rng(0)
    inputs = (
        rng.normal(size=(1, 4, 4, 8)).astype(np.float32),
        np.float32([500]),
        rng.normal(size=(1, 16, 32)).astype(np.float32),
        np.ones((1, 16), np.int32),
    )

    def velocity(params):
        params = jax.tree.map(jnp.asarray, params)
        return np.asarray(module.apply({"params": params}, *map(jnp.asarray, inputs)))

    wanted = velocity(lora.joined(before, trained, 0.5))
    np.testing.assert_allclose(velocity(found), wanted, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(velocity(before) - wanted).max() > 0.01 * np.abs(wanted).max()
    for read in (SanaPipeline.from_pretrained, folder.load_transformer):
        with pytest.raises(
            FileNotFoundError, match="pytorch_lora_weights.safetensors is a LoRA, a change to another model"
        ):
            read(tmp_path)
    pipe = SanaPipeline.from_pretrained(model, lora=tmp_path)
    assert np.isfinite(pipe("a cat", height=16, width=16, num_inference_steps=1, output_type="np")).all()


def test_the_first_step_has_the_loss_of_the_model_and_later_ones_learn(config, tmp_path):
    config.train.num_steps, config.optimizer.learning_rate = 4, 0.03
    loop.train(config, str(tmp_path / "lora"))
    with config.unlocked():
        config.lora.rank, config.lora.scale, config.lora.layers = 0, 1.0, lora.ATTENTIONS
    loop.train(config, str(tmp_path / "whole"))
    low_rank, whole = tiny_run.losses(tmp_path / "lora"), tiny_run.losses(tmp_path / "whole")
    assert low_rank[1] == pytest.approx(whole[1], rel=1e-5)
    heldout = [line["all_loss"] for line in tiny_run.metrics(tmp_path / "lora") if "all_loss" in line]
    assert heldout[-1] < heldout[0]


def test_a_resumed_lora_equals_an_uninterrupted_one_bit_for_bit(config, model, tmp_path):
    config.train.sample_every = 0
    wanted = loop.train(config, str(tmp_path / "whole"))
    config.train.num_steps = 2
    loop.train(config, str(tmp_path / "parts"))
    config.train.num_steps = 4
    found = loop.train(config, str(tmp_path / "parts"))
    assert_equal(jax.device_get(found), jax.device_get(wanted), rtol=0)
    files_of = [safetensors.numpy.load_file(tmp_path / run / "export" / files.FILES[0]) for run in ("whole", "parts")]
    assert_equal(*files_of, rtol=0)
    config.lora.rank = 3
    with pytest.raises(ValueError, match="lora.rank: 2 -> 3"):
        loop.train(config, str(tmp_path / "parts"))


def test_a_lora_does_not_go_on_beside_another_model(config, model, data, tmp_path):
    config.train.num_steps = config.train.checkpoint_every = 2
    config.train.sample_every = 0
    loop.train(config, str(tmp_path / "lora"))
    other, params = folder.load_transformer(model)
    params["proj_out"]["bias"] = params["proj_out"]["bias"] + 1
    folder.save_transformer(other, params, tmp_path / "other")
    config.init_from, config.train.num_steps = str(tmp_path / "other"), 4
    with pytest.raises(ValueError, match=r"weights of transformer are not .* Restore them \(config.init_from\)"):
        loop.train(config, str(tmp_path / "lora"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": 65}, r"lora.rank=65 is more than a kernel of self_attention/qkv, \[64, 64\]"),
        ({"model.interpolation_scale": 0.5}, "interpolation_scale .config 0.5, weights None"),
    ],
)
def test_what_no_lora_of_the_model_can_be_is_told_before_latents_are_computed(config, tmp_path, changes, message):
    config.train.cache_latents = True
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        loop.train(config, str(tmp_path))
    assert not (tmp_path / "latents").exists()


def test_settings_with_which_the_model_does_not_draw_are_told(config, tmp_path, caplog):
    config.train.num_steps, config.train.flow_shift, config.text_encoder.lower_case = 0, 6.0, False
    loop.train(config, str(tmp_path))
    assert "what trains is given other settings than the model" in caplog.text
    assert "lower_case True -> False; flow_shift 3.0 -> 6.0" in caplog.text


def test_a_model_trained_alike_is_not_warned_of(config, tmp_path, caplog):
    config.train.num_steps = 0
    loop.train(config, str(tmp_path))
    assert "other settings" not in caplog.text
