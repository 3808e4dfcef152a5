"""Runs that start from some blocks of another model: growth and pruning."""

import jax
import numpy as np
import pytest
import tiny_run

from sana_jax.models.depth import with_depth
from sana_jax.models.layers import BLOCKS
from sana_jax.training import loop
from sana_jax.weights import folder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_quickly")]


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    """A run's folder, of three blocks."""
    path = tmp_path_factory.mktemp("model") / "run"
    config = tiny_run.config(data / "pictures", data / "vae")
    config.model.num_layers, config.train.num_steps, config.train.sample_every = 3, 2, 0
    loop.train(config, str(path))
    return path


@pytest.fixture
def config(config, model):
    config.init_from = str(model)
    return config


def assert_equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))


def test_a_run_starts_from_the_blocks_it_names_and_new_ones_and_trains_them_all(config, model, tmp_path):
    config.init_blocks, config.model.num_layers, config.train.num_steps = (0, 2), 4, 0
    start = loop.train(config, str(tmp_path / "start")).params["transformer"]
    before = folder.load_transformer(model)[1]
    assert_equal({**start, BLOCKS: None}, {**before, BLOCKS: None})
    kept = jax.tree.map(lambda x: x[:2], start[BLOCKS])
    assert_equal(kept, jax.tree.map(lambda x: x[np.asarray([0, 2])], before[BLOCKS]))
    new = with_depth(before[BLOCKS], (0, 2), 4, jax.random.key(config.seed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), start[BLOCKS], new)

    config.train.num_steps = 4
    start = jax.device_get(start)
    state = loop.train(config, str(tmp_path / "run"))
    moved = jax.tree.map(
        lambda a, b: np.any(a != b, axis=tuple(range(1, a.ndim))), state.params["transformer"][BLOCKS], start[BLOCKS]
    )
    assert all(np.all(x) for x in jax.tree.leaves(moved)), "after some steps every parameter of every block has moved"
    assert folder.load_transformer(tmp_path / "run")[0].config.num_layers == 4
    config.init_blocks = ()  # a run that goes on has its own weights
    config.train.num_steps = 5
    loop.train(config, str(tmp_path / "run"))


def test_a_pruned_start_takes_norms_as_well(config, tmp_path):
    config.init_blocks, config.model.num_layers, config.train.num_steps = (0, 1), 3, 0
    config.init_adapts, config.model.qk_norm = ("qk_norm",), True
    start = loop.train(config, str(tmp_path)).params["transformer"][BLOCKS]
    scale = start["self_attention"]["norm_q"]["scale"]
    assert scale.shape[0] == 3 and np.all(scale == 1)
    assert not np.any(start["self_attention"]["out"]["kernel"][2])


@pytest.mark.parametrize(
    ("blocks", "layers", "message"),
    [
        ((), 4, "num_layers .config 4, weights 3.*or say with init_blocks which of its blocks are taken over"),
        ((0, 3), 4, "init_blocks has 3, and the model in .* has blocks 0 to 2"),
        ((0, 1, 2), 2, "init_blocks names 3 blocks for model.num_layers=2. Use model.num_layers=3, or more to add"),
    ],
)
def test_blocks_that_cannot_be_are_told_before_latents_are_computed(config, tmp_path, blocks, layers, message):
    config.train.cache_latents = True
    config.init_blocks, config.model.num_layers = blocks, layers
    with pytest.raises(ValueError, match=message):
        loop.train(config, str(tmp_path))
    assert not (tmp_path / "latents").exists()
