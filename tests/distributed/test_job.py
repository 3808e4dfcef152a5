"""What the processes of a job agree on: the checkpoint to go on from, the step to end at, and the exit code."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp
from processes import run_job, run_script

from configs import base
from sana_jax.checkpoint import Checkpoints
from sana_jax.parallel import multihost, peers
from sana_jax.parallel.mesh import make_mesh
from sana_jax.training.resume import make_record
from sana_jax.training.termination import Termination

SPLIT = {"kernel": P("fsdp"), "codes": P(None, "fsdp"), "step": P()}


def numbers(step):
    """The state after a step."""
    rng = np.random.default_rng(step)
    kernel = rng.normal(size=(8, 64)).astype(np.float32)
    return {"kernel": kernel, "codes": rng.integers(0, 255, (4, 96), np.uint8), "step": np.int32(step)}


def placed(step, mesh):
    return {name: jax.device_put(x, NamedSharding(mesh, SPLIT[name])) for name, x in numbers(step).items()}


def restore(checkpoints, mesh):
    """The step whose state came back, which is that state bit for bit in what this process holds of it."""
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, SPLIT[name]))
        for name, x in numbers(0).items()
    }
    state = checkpoints.restore(wanted)
    step = int(state["step"])
    for name, x in state.items():
        assert x.sharding == wanted[name].sharding
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, numbers(step)[name][shard.index])
    return step


def save(workdir):
    """One process with four devices."""
    mesh = make_mesh(fsdp=4)
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (3, 7):
            checkpoints.save(step, placed(step, mesh), make_record(base.get_config(), step, mesh))
    print(json.dumps(checkpoints.steps()))


def go_on(job, workdir):
    """One of two processes with two devices each."""
    multihost.start(ConfigDict(json.loads(job)))
    second = jax.process_index() == 1
    mesh, found = make_mesh(data=2, fsdp=2), {}
    load, failing = ocp.load, []

    def load_but_newest(path, state):
        if path.name == "7" and failing.pop():
            raise OSError("not on this machine")
        return load(path, state)

    with Termination() as termination:
        with Checkpoints(workdir, keep=2) as checkpoints:
            found["moved"] = restore(checkpoints, mesh)
            if second:
                ocp.load = load_but_newest
            failing[:] = [False, True]  # from the last: the first attempt fails, the second does not
            found["tried again"] = restore(checkpoints, mesh), checkpoints.steps()
            failing[:] = [True] * 9
            found["fallen back"], found["left"] = restore(checkpoints, mesh), checkpoints.steps()
            checkpoints.save(8, placed(8, mesh), make_record(base.get_config(), 8, mesh))
        if second:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)  # so that it is noticed before the first step is done
        for found["ended at"] in range(1, 500):
            if termination.due():
                break
            time.sleep(0.04 if second else 0.02)
    multihost_utils.reached_preemption_sync_point(0)  # an error where the service was not given back
    multihost.barrier("all have ended")
    print(json.dumps(found))


def end_alone(job, alone):
    """One of two processes, of which that of number `alone` has an error, and the other waits for it."""
    multihost.start(ConfigDict(json.loads(job)))
    peers.PERIOD, watch = 0.5, peers.Peers()
    print(json.dumps("has begun"), flush=True)
    if jax.process_index() == int(alone):
        watch.ask()
        watch.leave(74, timeout=1)
    time.sleep(peers.TIMEOUT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with the states of steps 3 and 7, saved by one process with four devices."""
    path = tmp_path_factory.mktemp("saved")
    assert run_script("import sys, test_job; test_job.save(sys.argv[1])", path, devices=4) == [7, 3]
    return path


@pytest.fixture(scope="module")
def job(saved, tmp_path_factory):
    """A copy of that folder from which two processes have gone on, and what they found."""
    path = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(saved, path)
    return path, run_job("import sys, test_job; test_job.go_on(*sys.argv[1:])", path, processes=2, devices=2)


def test_a_state_saved_by_four_devices_restores_onto_one(saved):
    with Checkpoints(saved, keep=2) as checkpoints:
        assert restore(checkpoints, make_mesh(data=1)) == 7


def test_a_state_saved_by_one_process_restores_onto_two(job):
    assert [found["moved"] for found in job[1]] == [7, 7]


def test_what_one_process_cannot_read_at_first_is_tried_again_by_all(job):
    assert [found["tried again"] for found in job[1]] == [[7, [7, 3]]] * 2


def test_where_one_process_cannot_read_the_newest_checkpoint_all_go_on_from_the_one_before(job):
    path, found = job
    assert [(each["fallen back"], each["left"]) for each in found] == [(3, [3]), (3, [3])]
    assert len(list((path / "checkpoints").glob("7.unreadable-*"))) == 1


def test_sigterm_to_one_process_while_all_start_ends_them_at_the_same_step(job):
    first, second = (found["ended at"] for found in job[1])
    assert first == second <= 2


@pytest.mark.parametrize("alone", [0, 1])  # 0 holds the service by which the other hears of it
def test_an_error_that_one_process_has_alone_ends_all_with_its_exit_code(alone):
    run_job("import sys, test_job; test_job.end_alone(*sys.argv[1:])", alone, processes=2, devices=1, code=74)
