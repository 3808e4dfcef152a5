"""Every config of configs/ loads, gives the model it is named after, and carries the published recipe."""

import dataclasses
import importlib
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from sana_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sana_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.parallel.sharding import array_spec
from sana_jax.training.optimizers.recipe import make_optimizer
from sana_jax.training.ranges import check_ranges
from sana_jax.training.settings import loader_config, model_config
from sana_jax.training.start import Change, check_same_model, teacher_config
from sana_jax.weights import folder

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - {"base", "published"})

# As in test_presets.py, plus the position-table models, whose table is no parameter.
PARAMETERS = {
    "sana_600m_512": 591_747_872,
    "sana_600m_1024": 591_747_872,
    "sana_1600m_512": 1_604_462_752,
    "sana_1600m_1024": 1_604_462_752,
    "sana_1600m_2k": 1_604_462_752,
    "sana_1600m_4k": 1_604_462_752,
    "sana15_1600m_1024": 1_604_641_952,
    "sana15_4800m_1024": None,
}
FLOW_SHIFTS = {"sana_600m_1024": 4.0, "sana_1600m_4k": 6.0}
SIZES = {"512": 512, "1024": 1024, "2k": 2048, "4k": 4096}


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


def transformer_shapes(config):
    c = model_config(TransformerConfig, config.model, config.dtype, "model")
    inputs = (
        jnp.zeros((2, c.sample_size, c.sample_size, c.in_channels)),
        jnp.zeros(2),
        jnp.zeros((2, 8, c.caption_channels)),
        jnp.zeros((2, 8), jnp.int32),
    )
    output, variables = jax.eval_shape(SanaTransformer(c).init_with_output, jax.random.key(0), *inputs)
    assert output.shape == (2, c.sample_size, c.sample_size, c.out_channels)
    return variables["params"]


def count(shapes):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", NAMES)
def test_config_describes_itself_and_makes_an_optimizer(name):
    module = importlib.import_module(f"configs.{name}")
    for heading in ("Hardware", "Command", f"--config=configs/{name}.py"):
        assert heading in module.__doc__, heading
    config = module.get_config()
    check_ranges(config)
    make_optimizer(config.optimizer, config.train.num_steps)
    assert loader_config(config.data).image_size == config.data.image_size


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_config_has_the_published_shape_and_recipe(name):
    config = load(name)
    shapes = transformer_shapes(config)
    if PARAMETERS[name]:
        assert count(shapes) == PARAMETERS[name]
    else:
        assert round(count(shapes) / 1e6, 1) == 4721.8
    assert config.data.image_size == SIZES[name.split("_")[-1]] == 32 * config.model.sample_size
    assert config.train.flow_shift == FLOW_SHIFTS.get(name, 3.0)
    assert config.train.class_dropout_prob == 0.1
    optimizer = config.optimizer
    assert optimizer.name == ("came8bit" if name == "sana15_4800m_1024" else "came")
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (1e-4, 2000)
    assert (optimizer.betas, optimizer.weight_decay, optimizer.grad_clip_norm) == ((0.9, 0.999, 0.9999), 0.0, 0.1)
    assert (config.dtype, config.model.remat, config.text_encoder.mode) == ("bfloat16", "full", "frozen")


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_large_weight_of_a_published_config_is_split_over_fsdp(name):
    config = load(name)
    for fsdp in (config.mesh.fsdp, 32):
        specs = jax.tree_util.tree_map_with_path(
            lambda path, x, fsdp=fsdp: (array_spec(path, x.shape, {"data": 1, "fsdp": fsdp, "seq": 1}), x),
            {"transformer": transformer_shapes(config)},
        )
        pairs = jax.tree.leaves(specs, is_leaf=lambda v: isinstance(v, tuple))
        whole = [x.shape for spec, x in pairs if "fsdp" not in spec]
        assert sum(map(math.prod, whole)) < 2e-3 * count(transformer_shapes(config))


def test_the_sprint_student_is_its_teacher_with_a_guidance_embedding():
    teacher, student = load("sana_sprint_1600m_1024_teacher"), load("sana_sprint_1600m_1024")
    assert teacher_config(student) == model_config(TransformerConfig, teacher.model, teacher.dtype, "model")
    assert student.distillation.teacher in teacher_command()
    shapes = folder.abstract_params(
        SanaTransformer(model_config(TransformerConfig, student.model, student.dtype, "model"))
    )
    assert count(shapes) == 1_610_237_472
    # It goes on from the public 1.6B model, whose field by field differences are those that it adapts to.
    started = model_config(TransformerConfig, load("sana_1600m_1024").model, teacher.dtype, "model")
    wanted = model_config(TransformerConfig, teacher.model, teacher.dtype, "model")
    check_same_model(wanted, started, "pretrained/sana", change=Change(adapts=tuple(teacher.init_adapts)))


def test_the_4800m_grows_from_the_run_of_the_1600m():
    grown, source = load("sana15_4800m_1024"), load("sana15_1600m_1024")
    assert f"--workdir={grown.init_from}" in importlib.import_module("configs.sana15_1600m_1024").__doc__
    models = [model_config(TransformerConfig, config.model, config.dtype, "model") for config in (grown, source)]
    check_same_model(*models, grown.init_from, change=Change(blocks=tuple(grown.init_blocks)))
    with pytest.raises(ValueError, match="init_blocks has 17, and the model in run has blocks 0 to 16"):
        shallow = dataclasses.replace(models[1], num_layers=17)
        check_same_model(models[0], shallow, "run", change=Change(blocks=tuple(grown.init_blocks)))


def teacher_command() -> str:
    """What makes the folder that the student's config names."""
    return importlib.import_module("configs.sana_sprint_1600m_1024_teacher").__doc__


def test_only_the_2k_and_4k_configs_have_a_position_table():
    tables = {name: load(name).model.interpolation_scale for name in PARAMETERS}
    assert {name: value for name, value in tables.items() if value is not None} == {
        "sana_1600m_2k": 1.0,
        "sana_1600m_4k": 2.0,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"self_attention": "softmax"},
        {"feed_forward": "gelu_mlp"},
        {"patch_size": 2},
        {"in_channels": 4, "out_channels": 4, "sample_size": 128, "patch_size": 2},  # F8C4P2
    ],
)
@pytest.mark.parametrize("name", ["emoji", "sana_600m_1024"])
def test_ablations_are_overrides(name, changes):
    config = load(name).lock()
    config.model.update(changes)
    transformer_shapes(config)


def test_the_decoders_config_trains_the_autoencoders_model():
    assert load("emoji_decoder").model == load("emoji_autoencoder").model


def test_the_emoji_configs_fit_each_other():
    emoji, autoencoder = load("emoji"), load("emoji_autoencoder")
    c = model_config(AutoencoderConfig, autoencoder.model, autoencoder.dtype, "model")
    assert autoencoder.data.image_size == emoji.data.image_size
    image = jnp.zeros((1, emoji.data.image_size, emoji.data.image_size, 3))
    key = jax.random.key(0)
    latents = jax.eval_shape(lambda k: Autoencoder(c).init_with_output(k, image, method="encode")[0], key)
    assert latents.shape[1:] == (emoji.model.sample_size, emoji.model.sample_size, emoji.model.in_channels)
    text = model_config(TextEncoderConfig, emoji.text_encoder.model, emoji.dtype, "text_encoder.model")
    ids = jnp.zeros((1, emoji.text_encoder.max_length), jnp.int32)
    states = jax.eval_shape(lambda k: TextEncoder(text).init_with_output(k, ids, ids)[0], key)
    assert states.shape[-1] == emoji.model.caption_channels


def test_an_unknown_model_field_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="num_layer is no field of TransformerConfig; did you mean num_layers"):
        model_config(TransformerConfig, {"num_layer": 3}, "float32", "model")


def test_a_missing_optional_number_can_be_overridden():
    config = load("emoji").lock()
    assert config.model.interpolation_scale is None
    config.model.interpolation_scale = 2.0
    assert model_config(TransformerConfig, config.model, "float32", "model").interpolation_scale == 2.0
