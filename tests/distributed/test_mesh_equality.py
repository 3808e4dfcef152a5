"""Training on eight (fake) devices, split in several ways, is training on one."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_run

from sana_jax.training import loop

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]

# Runs in a process of its own, because the number of devices is fixed once JAX has started.
SCRIPT = """
import json, sys
import jax, numpy as np
import tiny_run
from sana_jax.parallel.mesh import check_batch, make_mesh
from sana_jax.training import loop

pictures, autoencoder, out = sys.argv[1:]
assert jax.device_count() == 8

def run(name, steps, **axes):
    config = tiny_run.config(pictures, autoencoder)
    config.train.num_steps = steps
    config.optimizer.adamw_eps = 1e-2  # else Adam turns the rounding of a gradient near zero into a whole step
    config.train.sample_every = 0
    config.mesh.update(axes)
    state = loop.train(config, f"{out}/{name}")
    split = sum("fsdp" in x.sharding.spec for x in jax.tree.leaves(state))
    np.savez(f"{out}/{name}_{steps}.npz", *map(np.asarray, jax.tree.leaves(jax.device_get(state))))
    return split

split = {"data": run("data", 3, data=8), "fsdp": run("fsdp", 2, data=1, fsdp=8)}
split["moved"] = run("fsdp", 3, data=2, fsdp=2, seq=2)
try:
    check_batch(30, make_mesh(fsdp=4))
except ValueError as error:
    split["error"] = str(error)
json.dump(split, open(f"{out}/split.json", "w"))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("mesh")
    tiny_run.write_pictures(path / "pictures", 24)
    tiny_run.write_autoencoder(path / "vae")
    config = tiny_run.config(path / "pictures", path / "vae")
    config.optimizer.adamw_eps = 1e-2
    config.train.sample_every = 0
    config.mesh.data = 1
    references = {}
    for steps in (2, 3):
        config.train.num_steps = steps
        references[steps] = jax.device_get(loop.train(config, str(path / "one")))
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the time
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, "-c", SCRIPT, str(path / "pictures"), str(path / "vae"), str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return path, references, json.loads((path / "split.json").read_text())


def assert_equal(runs, name, steps):
    path, references, _ = runs
    found = np.load(path / f"{name}_{steps}.npz")
    for array, expected in zip(found.values(), jax.tree.leaves(references[steps]), strict=True):
        np.testing.assert_allclose(array, expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(("name", "steps"), [("data", 3), ("fsdp", 2)])
def test_eight_devices_train_as_one(runs, name, steps):
    assert_equal(runs, name, steps)


def test_a_run_moves_to_another_mesh_in_the_middle(runs):
    """Two steps on fsdp=8, the third on data=2, fsdp=2, seq=2."""
    assert_equal(runs, "fsdp", 3)


def test_weights_and_their_moments_are_split_over_fsdp_only(runs):
    split = runs[2]
    assert split["data"] == 0
    assert split["fsdp"] == split["moved"] >= 16


def test_a_batch_that_the_mesh_cannot_split_is_an_error_with_the_fix(runs):
    assert "data.batch_size=30 is not a multiple of mesh.data * mesh.fsdp = 8" in runs[2]["error"]
    assert "Use data.batch_size=32" in runs[2]["error"]
