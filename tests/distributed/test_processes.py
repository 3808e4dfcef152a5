"""Training by several processes with devices of their own (real collectives, gloo on localhost) is training by one."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_run

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
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

data, workdir, mesh = sys.argv[1:]
sharding.MIN_SHARDED = 2**10  # the tiny model's matrices are split too
config = tiny_run.config(f"{data}/pictures", f"{data}/vae")
config.train.num_steps = 20
config.train.sample_every = 0
config.train.checkpoint_every = 10
config.optimizer.adamw_eps = 1e-2  # else Adam turns the rounding of a gradient near zero into a whole step
config.mesh.update(json.loads(mesh))
multihost.start(config.mesh)
assert jax.process_count() == max(1, config.mesh.num_processes) and jax.device_count() == 8
state = loop.train(config, workdir)
if config.mesh.fsdp > 1:
    assert sum("fsdp" in x.sharding.spec for x in jax.tree.leaves(state.params)) > 10
"""


def run(name, data, workdir):
    processes, devices, axes = RUNS[name]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for number in range(processes):
        mesh = axes | {"multihost": processes > 1}
        if processes > 1:
            mesh |= {"coordinator": f"127.0.0.1:{port}", "num_processes": processes, "process_id": number}
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the time
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        command = [sys.executable, "-c", SCRIPT, str(data), str(workdir), json.dumps(mesh)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=900)[1] for process in running]
    for process, error in zip(running, errors, strict=True):
        assert process.returncode == 0, error[-3000:]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_run.write_pictures(path / "pictures", 24)
    tiny_run.write_autoencoder(path / "vae")
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
