"""Presets have the published parameter counts; shapes alone are computed."""

import jax
import jax.numpy as jnp
import pytest

from sana_jax.models import presets
from sana_jax.models.transformer import SanaTransformer

# Counts derived from the public layout, the 1.6B one also as logged by the official trainer.
COUNTS = {
    "sana_600m": 591_747_872,
    "sana_1600m": 1_604_462_752,
    "sana15_1600m": 1_604_641_952,
    "sana15_2400m": 2_383_937_952,
    "sana15_3200m": 3_163_233_952,
    "sana15_4800m": 4_721_825_952,
    "sprint_600m": 593_501_216,
    "sprint_1600m": 1_610_237_472,
}


@pytest.mark.parametrize("name", COUNTS)
def test_transformer_preset_has_the_published_number_of_parameters(name):
    config = getattr(presets, name)()
    guidance = jnp.ones(1) if config.guidance_embeds else None

    def init(key):
        text, mask = jnp.zeros((1, 300, config.caption_channels)), jnp.ones((1, 300), jnp.int32)
        return SanaTransformer(config).init(key, jnp.zeros((1, 4, 4, 32)), jnp.zeros(1), text, mask, guidance)

    shapes = jax.eval_shape(init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[name]


@pytest.mark.parametrize(("sample_size", "scale"), [(16, None), (32, None), (64, 1.0), (128, 2.0)])
def test_only_the_2k_and_4k_models_have_a_position_table(sample_size, scale):
    assert presets.sana_1600m(sample_size).interpolation_scale == scale
