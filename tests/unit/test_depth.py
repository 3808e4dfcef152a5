"""Depth growth and pruning: new blocks change nothing and can learn, kept ones are those of the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipeline import TRANSFORMER, random_params

from sana_jax.models.depth import with_depth
from sana_jax.models.layers import BLOCKS
from sana_jax.models.text_encoder import TextEncoderConfig
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.training.start import check_same_model

KINDS = (
    {},
    {"qk_norm": True, "num_cross_attention_heads": 2},
    {"self_attention": "softmax", "feed_forward": "gelu_mlp"},
)


def model(num_layers=3, **fields):
    config = TransformerConfig(**TRANSFORMER | {"num_layers": num_layers} | fields)
    return SanaTransformer(config)


def inputs():
    rng = np.random.default_rng(5)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    mask = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return normal(2, 4, 4, 8), jnp.asarray([300.0, 900.0]), normal(2, 5, 32), mask


def velocity(module, params):
    return module.apply({"params": params}, *inputs())


def params_of(module):
    return jax.tree.map(jnp.asarray, random_params(module, 0))


def resized(params, kept, num_layers):
    return params | {BLOCKS: with_depth(params[BLOCKS], kept, num_layers, jax.random.key(1))}


def with_layers(module, num_layers):
    return SanaTransformer(dataclasses.replace(module.config, num_layers=num_layers))


@pytest.mark.parametrize("fields", KINDS)
def test_a_grown_model_computes_what_the_kept_blocks_do(fields):
    small = model(**fields)
    params = params_of(small)
    kept = (0, 1)
    alone = params | {BLOCKS: jax.tree.map(lambda x: x[np.asarray(kept)], params[BLOCKS])}
    found = velocity(with_layers(small, 5), resized(params, kept, 5))
    np.testing.assert_array_equal(found, velocity(with_layers(small, 2), alone))
    assert not np.allclose(found, velocity(small, params)), "the block that was left out did something"


@pytest.mark.parametrize("fields", KINDS)
def test_every_branch_of_a_new_block_learns_from_the_first_step_on(fields):
    module = with_layers(model(**fields), 4)
    params = resized(params_of(model(**fields)), (0, 1), 4)
    gradients = jax.grad(lambda params: jnp.sum(velocity(module, params) ** 2))(params)[BLOCKS]
    for layer in ("self_attention/out", "cross_attention/out", "feed_forward/project"):
        part, name = layer.split("/")
        for block in (2, 3):
            assert np.abs(gradients[part][name]["kernel"][block]).max() > 0, (layer, block)


def test_new_blocks_begin_as_the_paper_says():
    """SANA-1.5, section 2.1, and its code: zeros, ones, normal numbers of 0.02, and of 0.2 in the depthwise convolution."""
    wide = model(qk_norm=True, width=256)
    new = jax.tree.map(lambda x: np.asarray(x[3:]), resized(params_of(wide), (0, 1, 2), 5)[BLOCKS])
    attentions = new["self_attention"], new["cross_attention"]
    for attention in attentions:
        assert not attention["out"]["kernel"].any() and not attention["out"]["bias"].any()
        assert (attention["norm_q"]["scale"] == 1).all() and (attention["norm_k"]["scale"] == 1).all()
    cross, feed_forward = new["cross_attention"], new["feed_forward"]
    assert not cross["query"]["bias"].any() and not cross["kv"]["bias"].any()
    assert not feed_forward["project"]["kernel"].any()
    small = [
        new["self_attention"]["qkv"]["kernel"],
        cross["query"]["kernel"],
        cross["kv"]["kernel"],
        new["scale_shift_table"],
    ]
    small += [feed_forward["expand"][name] for name in ("kernel", "bias")]
    large = [feed_forward["depthwise"][name] for name in ("kernel", "bias")]
    for std, arrays in ((0.02, small), (0.2, large)):
        for array in arrays:
            np.testing.assert_allclose([array.mean() / std, array.std() / std], [0, 1], atol=0.1)
    assert len({float(array.flat[0]) for array in small + large}) == len(small + large), "no two share their numbers"
    assert not np.array_equal(small[0][0], small[0][1])


def test_kept_blocks_come_in_the_order_they_are_named():
    params = params_of(model())
    for kept in ((2, 0), (0, 0, 1, 1, 2, 2)):
        found = resized(params, kept, len(kept))[BLOCKS]
        jax.tree.map(
            lambda a, b, kept=kept: np.testing.assert_array_equal(a, b[np.asarray(kept)]), found, params[BLOCKS]
        )


def test_init_blocks_is_no_remedy_for_a_text_encoder():
    wanted, found = TextEncoderConfig(num_layers=3), TextEncoderConfig(num_layers=2)
    with pytest.raises(ValueError, match=r"num_layers .config 3, weights 2.\. Change config.model\.$"):
        check_same_model(wanted, found, "x")
