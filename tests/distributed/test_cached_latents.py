"""Latents that are cached by all devices of all processes, and trained on by all."""

import pytest
import tiny_run
from processes import run_job, run_script

SCRIPT = """
import json, os, pathlib, signal, sys, time
import jax
import tiny_run
from sana_jax.data import latent_cache
from sana_jax.parallel import multihost
from sana_jax.training import loop, sources
from sana_jax.training.termination import Preempted

*job, data, workdir, told = sys.argv[1:]
data, workdir = pathlib.Path(data), pathlib.Path(workdir)
if told == "apart":  # all but the tokenizer
    make, shared = sources.make_tokenizer, str(workdir)
    sources.make_tokenizer = lambda config, workdir, resumed: make(config, shared, resumed)
    latent_cache._PATIENCE, workdir = 1.0, workdir / str(json.loads(job[0])["process_id"])
config = tiny_run.config(data / "pictures", data / "vae")
with config.unlocked():
    config.train.cache_latents, config.train.num_steps, config.train.sample_every = True, 1, 0
if job:
    config.mesh.update(json.loads(job[0]))
multihost.start(config.mesh)
latent_cache.CHUNK = 4
write, written = latent_cache._write, []

def noted(file, latents):
    write(file, latents)
    written.append(file.name)
    if told == "once":
        if jax.process_index() == 1 and len(written) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # the service looks about once a second

latent_cache._write = noted
try:
    loop.train(config, str(workdir))
except Preempted:
    print(json.dumps(["preempted", written]))
except FileNotFoundError as error:
    print(json.dumps([str(error), written]))
else:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    print(json.dumps([[line["loss"] for line in lines if "loss" in line], written]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_run.write_data(path)
    return path


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """(losses, files) of a run on one device."""
    return run_script(SCRIPT, data, tmp_path_factory.mktemp("alone"), "never", devices=1)


def test_a_run_with_cached_latents_on_two_devices_has_the_loss_of_one(data, alone, tmp_path):
    losses, files = run_script(SCRIPT, data, tmp_path, "never", devices=2)
    assert len(losses) == 1 and losses == pytest.approx(alone[0], rel=1e-5)
    assert files == alone[1] == [f"{number:05d}.npy" for number in range(60)], "24 drawings, each on 10 backgrounds"


@pytest.mark.slow
def test_two_processes_share_the_work_and_end_together_when_one_is_told_to(data, alone, tmp_path):
    first, second = run_job(SCRIPT, data, tmp_path, "once", processes=2, devices=1)
    assert first[0] == second[0] == "preempted" and len(first[1]) == len(second[1]) < 15
    done = first[1] + second[1]
    again = run_job(SCRIPT, data, tmp_path, "never", processes=2, devices=1)
    assert sorted(done + again[0][1] + again[1][1]) == alone[1], "each file is written once"
    assert abs(len(again[0][1]) - len(again[1][1])) <= 1
    assert again[0][0] == pytest.approx(alone[0], rel=1e-5)


@pytest.mark.slow
def test_hosts_that_share_no_folder_are_told_before_the_work_is_done(data, tmp_path):
    for message, files in run_job(SCRIPT, data, tmp_path, "apart", processes=2, devices=1):
        assert "--workdir must be a folder that all hosts see" in message and len(files) == 1
