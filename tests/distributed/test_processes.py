"""Training by several processes with devices of their own (real collectives, gloo on localhost) is training by one."""

import json

import numpy as np
import pytest
import tiny_run
from processes import run_job

pytestmark = pytest.mark.slow

STEPS = 20
# processes, devices of each, mesh
RUNS = {
    "one": (1, 8, {"data": 8}),
    "two": (2, 4, {"data": 2, "fsdp": 2, "seq": 2}),
    "four": (4, 2, {"data": 2, "seq": 4}),  # a picture's rows go over two processes
}

SCRIPT = """
import json, sys
import jax
import tiny_run
from sana_jax.parallel import multihost, sharding
from sana_jax.training import loop

job, data, workdir, axes = sys.argv[1:]
sharding.MIN_SHARDED = 2**10  # the tiny model's matrices are split too
config = tiny_run.config(f"{data}/pictures", f"{data}/vae")
config.train.num_steps = 20
config.train.sample_every = 0
config.train.checkpoint_every = 10
config.optimizer.adamw_eps = 1e-2  # else Adam turns the rounding of a gradient near zero into a whole step
config.mesh.update(json.loads(job) | json.loads(axes))
multihost.start(config.mesh)
assert jax.process_count() == config.mesh.num_processes and jax.device_count() == 8
state = loop.train(config, workdir)
if config.mesh.fsdp > 1:
    assert sum("fsdp" in x.sharding.spec for x in jax.tree.leaves(state.params)) > 10
print(json.dumps("trained"))
"""


def run(name, data, workdir):
    processes, devices, axes = RUNS[name]
    said = run_job(SCRIPT, data, workdir, json.dumps(axes), processes=processes, devices=devices)
    assert said == ["trained"] * processes
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_run.write_data(path)
    return path


@pytest.fixture(scope="module")
def losses_of_one(data, tmp_path_factory):
    return run("one", data, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", ["two", "four"])
def test_processes_and_splits_change_no_loss_over_twenty_steps(name, data, losses_of_one, tmp_path):
    losses = run(name, data, tmp_path)
    assert list(losses) == list(losses_of_one) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(losses.values()), list(losses_of_one.values()), rtol=1e-5)
    assert abs(losses[STEPS] - losses[1]) > 1e-2
    assert (tmp_path / "export" / "model_index.json").is_file()
