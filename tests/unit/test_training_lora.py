"""LoRAs that train: the layers with factors beside their kernels, against kernels to which the product was added."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import traverse_util

from configs import base
from sana_jax.models.transformer import SanaTransformer
from sana_jax.training import lora
from sana_jax.training.ranges import check_ranges
from sana_jax.training.start import check_same_model
from sana_jax.weights import folder

SCALE, RANK = 0.7, 3


def normal(shapes, seed, std):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=std), jnp.float32), shapes)


@pytest.fixture(params=["mix_ffn", "gelu_mlp"])
def model(request):
    module = SanaTransformer(dataclasses.replace(tiny_run.TRANSFORMER, feed_forward=request.param))
    return module, normal(folder.abstract_params(module), 0, 0.2)


def merged(params, factors, scale):
    """W + scale A B for every kernel that has factors, by NumPy's rules of products."""
    flat = traverse_util.flatten_dict(params)
    for path in [path for path in traverse_util.flatten_dict(factors) if path[-1] == "lora_down"]:
        node = factors
        for name in path[:-1]:
            node = node[name]
        down, up = node["lora_down"], node["lora_up"]
        if down.ndim == 4:
            product = jnp.stack([down[:, :, k] @ up[:, k] for k in range(down.shape[2])], axis=2)
        else:
            product = down @ up
        flat[*path[:-1], "kernel"] += scale * product
    return traverse_util.unflatten_dict(flat)


def loss(module, params):
    rng = np.random.default_rng(1)
    latents, text, target = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 4, 4, 8), (2, 5, 32), (2, 4, 4, 8))
    )
    velocity = module.apply({"params": params}, latents, jnp.asarray([100.0, 900.0]), text, jnp.ones((2, 5), jnp.int32))
    return jnp.mean(jnp.square(velocity - target))


def test_factors_beside_kernels_give_the_loss_and_gradients_of_their_product_added(model):
    module, params = model
    factors = normal(lora.init(jax.random.key(0), params, RANK, lora.LAYERS), 2, 0.2)

    def of_factors(factors):
        return loss(module, lora.joined(params, factors, SCALE))

    def of_sums(factors):
        return loss(module, merged(params, factors, SCALE))

    found, gradients = jax.jit(jax.value_and_grad(of_factors))(factors)
    wanted, wanted_gradients = jax.jit(jax.value_and_grad(of_sums))(factors)
    assert abs(float(wanted) - float(loss(module, params))) > 0.05, "the change is seen"
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(wanted_gradients), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))
        assert np.any(b)


def test_a_lora_begins_as_the_model_itself(model):
    module, params = model
    factors = lora.init(jax.random.key(0), params, RANK, lora.LAYERS)
    assert float(loss(module, lora.joined(params, factors, 1.0))) == float(loss(module, params))
    down = factors["blocks"]["self_attention"]["qkv"]["lora_down"]
    assert down.shape == (2, 64, 3, RANK) and 0.9 < np.abs(down).max() * 8 <= 1


def test_a_rank_above_a_kernels_is_an_error(model):
    with pytest.raises(ValueError, match=r"lora.rank=65 is more than a kernel of self_attention/out, \[64, 64\]"):
        lora.init(jax.random.key(0), model[1], 65, ("self_attention/out",))


def test_another_grid_is_another_model_only_where_positions_depend_on_it():
    plain = tiny_run.TRANSFORMER
    check_same_model(dataclasses.replace(plain, sample_size=8), plain, "x", fixed=True)
    table = dataclasses.replace(plain, interpolation_scale=1.0)
    for other in (dataclasses.replace(table, sample_size=8), plain):
        with pytest.raises(ValueError, match="sample_size|interpolation_scale"):
            check_same_model(other, table, "x", fixed=True)
        check_same_model(other, table, "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.scale": 2.0}, "lora.scale=2.0 is not read with lora.rank=0"),
        ({"lora.layers": ("self_attention/out",)}, "lora.layers=.* is not read with lora.rank=0"),
        ({"lora.rank": 4}, "Use init_from=FOLDER"),
        (
            {"lora.rank": 4, "init_from": "x", "text_encoder.mode": "train"},
            "Use text_encoder.mode='frozen' and text_encoder.path",
        ),
        ({"lora.rank": 4, "init_from": "x", "lora.scale": 0.0}, "lora.scale=0.0: use more than 0"),
        ({"lora.rank": -1}, "lora.rank=-1: use 0 or more"),
        ({"lora.rank": 4, "init_from": "x", "lora.layers": ()}, "name one layer or more"),
        ({"lora.rank": 4, "init_from": "x", "lora.layers": ("self_attention/out",) * 2}, "each once"),
        ({"lora.rank": 4, "init_from": "x", "optimizer.name": "muon"}, "optimizer.name='muon' .* Use adamw or came"),
        ({"lora.rank": 4, "init_from": "x", "lora.layers": ("attention/out",)}, "did you mean .*attention/out"),
    ],
)
def test_impossible_settings_are_errors_that_say_what_to_change(changes, message):
    config = base.get_config()
    config.text_encoder.mode, config.text_encoder.path = "frozen", "x"
    if changes.get("text_encoder.mode"):
        config.text_encoder.path = ""
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        check_ranges(config)
