"""ControlNets that train: what they begin as, what has a gradient, what they cost, what cannot be."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from test_native import write

from configs import base
from sana_jax import flops
from sana_jax.models.layers import BLOCKS, take_apart
from sana_jax.models.transformer import SanaTransformer
from sana_jax.models.transformer_block import Residuals
from sana_jax.parallel.mesh import make_mesh
from sana_jax.parallel.sharding import shardings
from sana_jax.parallel.transformer import apply_transformer
from sana_jax.training import controlnet
from sana_jax.training.adapter import make_adapter
from sana_jax.training.ranges import check_ranges
from sana_jax.training.start import check_start
from sana_jax.weights import folder, layout, native, native_controlnet, parts

LAYERS = 4


def make_config(**changes):
    config = tiny_run.config("pictures", "vae")
    with config.unlocked():
        config.model = base.fields(dataclasses.replace(tiny_run.TRANSFORMER, num_layers=LAYERS))
        config.controlnet.num_layers = 2
        config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A transformer with random weights, and its folder."""
    module = SanaTransformer(dataclasses.replace(tiny_run.TRANSFORMER, num_layers=LAYERS))
    rng = np.random.default_rng(0)
    shapes = folder.abstract_params(module)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.2), jnp.float32), shapes)
    path = tmp_path_factory.mktemp("model")
    folder.save_transformer(module, params, path)
    return types.SimpleNamespace(module=module, params=params, path=path)


def begin(model, **changes):
    adapter = make_adapter(make_config(**{"init_from": str(model.path)} | changes), model.module)
    shapes = {"controlnet": parts.abstract_params(adapter.net)}
    return adapter, adapter.load_initial(shardings(shapes, make_mesh(devices=jax.devices()[:1])))


def inputs():
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return (
        normal(2, 4, 4, 8),
        normal(2, 4, 4, 8),
        jnp.asarray([100.0, 900.0]),
        normal(2, 5, 32),
        jnp.ones((2, 5), jnp.int32),
    )


def velocity(model, adapter, params):
    latents, hint, timesteps, text, mask = inputs()
    branch = adapter.branch(params, hint, text)
    weights = adapter.weights(params, {"transformer": model.params})
    return apply_transformer(model.module, weights, latents, timesteps, text, mask, branch=branch)


@pytest.mark.parametrize("wiring", ["diffusers", "original"])
def test_a_controlnet_begins_as_a_copy_that_adds_nothing_and_learns_from_the_first_step_on(model, wiring):
    adapter, params = begin(model, **{"controlnet.wiring": wiring})
    latents, _, *rest = inputs()
    alone = model.module.apply({"params": model.params}, latents, *rest)
    np.testing.assert_allclose(velocity(model, adapter, params), alone, atol=1e-6 * float(jnp.abs(alone).max()))
    copies = params["controlnet"]
    for name in ("patch_embed", "time_embed", "modulation", "caption"):
        jax.tree.map(np.testing.assert_array_equal, copies[name], model.params[name])
    own = {name: leaves for name, leaves in copies[BLOCKS].items() if name != "residual"}
    jax.tree.map(lambda copy, whole: np.testing.assert_array_equal(copy, whole[:2]), own, model.params[BLOCKS])

    loss = lambda params: jnp.mean(jnp.square(velocity(model, adapter, params)))
    gradient_of = jax.jit(jax.grad(loss))
    gradient = gradient_of(params)["controlnet"]
    assert all(np.abs(gradient[BLOCKS]["residual"]["kernel"][number]).max() > 0 for number in range(2))
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + rng.normal(size=x.shape, scale=0.02).astype(np.float32), params)
    gradient = gradient_of(moved)["controlnet"]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient)), (
        "of every parameter, once they are not zero"
    )


@pytest.mark.parametrize(("wiring", "number"), [("diffusers", 2), ("original", 1)])
def test_the_second_copy_adds_to_the_output_of_this_block(model, wiring, number):
    """Of a residual that is the same everywhere: what the transformer gives with that added by hand."""
    adapter, params = begin(model, **{"controlnet.wiring": wiring})
    assert controlnet.first_guided(adapter.net.config) == number, "the first goes into this block"
    params["controlnet"][BLOCKS]["residual"]["bias"] = jnp.zeros((2, 64)).at[1].set(0.5)
    latents, _, *rest = inputs()
    added = lambda stream: Residuals([jnp.full_like(stream, 0.5)], number)
    apart = take_apart(jax.tree.map(jnp.asarray, model.params))
    wanted = model.module.apply({"params": apart}, latents, *rest, control=added)
    np.testing.assert_allclose(velocity(model, adapter, params), wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_a_trained_controlnet_can_be_gone_on_from(model, tmp_path):
    adapter, params = begin(model)
    rng = np.random.default_rng(2)
    trained = jax.tree.map(lambda x: np.asarray(x) + rng.normal(size=x.shape).astype(np.float32), params)
    adapter.export(trained, tmp_path, "float32")
    again = {"controlnet.init_from": str(tmp_path)}
    _, found = begin(model, **again)
    jax.tree.map(np.testing.assert_array_equal, found, trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"controlnet.num_layers": 3},
            "of another model: num_layers .config 3, weights 2.. Use .* controlnet.num_layers=2",
        ),
        ({"model.qk_norm": True}, "of another model: qk_norm .config True, weights False."),
        ({"model.attention_head_dim": 16}, "of another model: attention_head_dim .config 16, weights 32."),
        (
            {"controlnet.wiring": "original"},
            "is connected as 'diffusers'. Use controlnet.wiring=diffusers, or, if it was trained",
        ),
    ],
)
def test_a_controlnet_of_another_model_is_not_gone_on_from(model, tmp_path, changes, message):
    adapter, params = begin(model)
    adapter.export(jax.device_get(params), tmp_path, "float32")
    base = dataclasses.replace(
        model.module.config, **{name.removeprefix("model."): changes[name] for name in changes if "model." in name}
    )
    shapes = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), folder.abstract_params(SanaTransformer(base)))
    folder.save_transformer(SanaTransformer(base), shapes, tmp_path / "base")
    config = make_config(**{"init_from": str(tmp_path / "base"), "controlnet.init_from": str(tmp_path)} | changes)
    with pytest.raises(ValueError, match=message):
        check_start(config)
    check_start(config, resumed=True)


def test_a_file_of_the_original_code_is_gone_on_from_as_it_was_trained(model, tmp_path):
    adapter, params = begin(model, **{"controlnet.wiring": "original"})
    tensors = layout.write(native_controlnet.entries(adapter.net.config), jax.device_get(params["controlnet"]))
    tensors |= layout.write(native.entries(model.module.config), jax.device_get(model.params))
    file = str(write(tmp_path / "net.pth", {f"{name}": tensor for name, tensor in tensors.items()}))
    wanted = {"init_from": str(model.path), "controlnet.init_from": file}
    check_start(make_config(**wanted | {"controlnet.wiring": "original"}))
    _, found = begin(model, **wanted | {"controlnet.wiring": "original"})
    jax.tree.map(np.testing.assert_array_equal, found, params)
    with pytest.raises(ValueError, match="is connected as 'original'. Use controlnet.wiring=original"):
        check_start(make_config(**wanted))


def test_a_step_costs_the_copies_thrice_and_the_guided_blocks_twice(model):
    adapter, _ = begin(model)
    whole = flops.transformer_flops(model.module.config, 4, 4, 16)
    assert adapter.picture_flops(whole) == 3 * (whole // 2) + whole // 2 + 2 * (whole // 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controlnet.wiring": "original"}, "controlnet.wiring='original' is not read with controlnet.num_layers=0"),
        ({"controlnet.num_layers": -1}, "controlnet.num_layers=-1: use 0 or more"),
        ({"controlnet.num_layers": 7}, "controlnet.num_layers=7 changes a model that is there. Use init_from"),
        (
            {"controlnet.num_layers": 7, "init_from": "x", "controlnet.wiring": "other"},
            "is not one of diffusers, original",
        ),
        ({"controlnet.num_layers": 7, "init_from": "x", "lora.rank": 4}, "and lora.rank=4 a LoRA. Use one of them"),
        (
            {"controlnet.num_layers": 7, "init_from": "x", "init_blocks": (0,)},
            "init_blocks=.* is of a transformer that trains",
        ),
    ],
)
def test_impossible_settings_are_errors_that_say_what_to_change(changes, message):
    config = base.get_config()
    config.text_encoder.mode, config.text_encoder.path = "frozen", "x"
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        check_ranges(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controlnet.num_layers": LAYERS}, "blocks are copied of model.num_layers=4, .* Use 3 or less"),
        (
            {"model.interpolation_scale": 1.0},
            "config.controlnet: interpolation_scale=1.0: .* use controlnet.wiring=original",
        ),
    ],
)
def test_a_controlnet_that_no_model_has_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        controlnet.controlnet_config(make_config(**changes))
