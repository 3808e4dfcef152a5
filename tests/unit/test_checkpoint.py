"""Checkpoints: what comes back, what is kept, what must agree."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import base
from sana_jax.checkpoint import Checkpoints, contradictions, make_record, plain
from sana_jax.parallel.mesh import make_mesh
from sana_jax.training.optimizers.came import scale_by_came
from sana_jax.training.state import init_state


@pytest.fixture
def state():
    params = {"blocks": {"kernel": jax.random.normal(jax.random.key(0), (2, 4, 6))}, "bias": jnp.arange(3.0)}
    return init_state(params, optax.chain(optax.clip(1.0), scale_by_came()), with_ema=True)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def test_state_and_record_come_back_bit_for_bit(tmp_path, state):
    config = base.get_config()
    mesh = make_mesh(devices=jax.devices()[:1])
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(7, state, make_record(config, 7, mesh))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 7
        restored = checkpoints.restore(7, abstract(state))
        record = checkpoints.record(7)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert record["data_position"] == 7
    assert contradictions(record["config"], config) == []


def test_only_the_newest_checkpoints_are_kept(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state, {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["3", "4"]


def test_contradictions_list_every_field_that_changes_the_model_or_its_updates():
    config = base.get_config()
    saved = copy.deepcopy(plain(config))
    config.data.batch_size = 8
    config.optimizer.learning_rate = 1.0
    config.mesh.fsdp = 2
    config.train.log_every = 1
    config.train.num_steps = 5
    config.sample.prompts = ("a cat",)
    assert contradictions(saved, config) == [
        "data.batch_size: 1024 -> 8",
        "optimizer.learning_rate: 0.0001 -> 1.0",
    ]


def test_a_run_with_a_decay_to_its_end_may_not_change_its_length():
    config = base.get_config()
    config.optimizer.schedule = "cosine"
    saved = plain(config)
    config.train.num_steps = 5
    assert contradictions(saved, config) == ["train.num_steps: 100000 -> 5"]


def test_fields_that_went_are_contradictions_and_newer_ones_are_not():
    saved = {"model": {"width": 64, "old": 1}}
    assert contradictions(saved, ConfigDict({"model": {"width": 64, "new": 2}})) == [
        "model.old: 1 -> '(absent)'",
    ]
