"""A distillation over several devices, teacher, student and critic split over them, has the losses that it has on one."""

import json

import numpy as np
import pytest
import tiny_run
from processes import run_script

from sana_jax.training import loop

pytestmark = pytest.mark.slow

STEPS = 4
SCRIPT = """
import dataclasses, json, sys
import jax
import tiny_run
from configs import base
from sana_jax.training import loop

data, workdir, changes = sys.argv[1:]
config = tiny_run.config(f"{data}/pictures", f"{data}/vae")
with config.unlocked():
    student = dataclasses.replace(
        tiny_run.TRANSFORMER, timestep_scale=0.001, integer_timesteps=False, guidance_embeds=True, width=128
    )
    config.model = base.fields(student)
    config.text_encoder.update(mode="frozen", path=f"{data}/teacher")
    config.distillation.update(teacher=f"{data}/teacher", critic_blocks=(0, 1), tangent_warmup=2)
    config.train.update(num_steps=4, sample_every=0)
    config.optimizer.update(learning_rate=0.01, adamw_eps=1e-2)  # else Adam turns rounding into whole steps
    config.update_from_flattened_dict({name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(changes).items()})
state = loop.train(config, workdir)
critic = state.params.get("critic", {}).get("layers", {}).get("along", {}).get("kernel")
print(json.dumps(list(map(str, critic.sharding.spec)) if critic is not None else []))
"""
WITHOUT_CRITIC = {"distillation.adversarial_weight": 0.0, "distillation.critic_blocks": [2, 8, 14, 19]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_run.write_data(path)
    config = tiny_run.config(path / "pictures", path / "vae")
    with config.unlocked():
        config.model.update(timestep_scale=0.001, integer_timesteps=False, width=128)
    config.train.num_steps, config.train.sample_every = 1, 0
    loop.train(config, str(path / "teacher"))
    return path


@pytest.mark.parametrize(
    ("mesh", "changes", "split"),
    [
        ({"mesh.data": 2, "mesh.fsdp": 2}, {}, True),
        ({"mesh.fsdp": 2, "mesh.seq": 2}, WITHOUT_CRITIC, False),
    ],
    ids=["critic", "rows"],
)
def test_a_split_distillation_has_the_same_losses(data, tmp_path, mesh, changes, split):
    run_script(SCRIPT, data, tmp_path / "alone", json.dumps(changes), devices=1)
    found = run_script(SCRIPT, data, tmp_path / "split", json.dumps(changes | mesh), devices=4)
    assert ("fsdp" in found) == split
    losses = [list(tiny_run.losses(tmp_path / name).values()) for name in ("alone", "split")]
    assert len(losses[0]) == STEPS and len(set(losses[0])) == STEPS
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
