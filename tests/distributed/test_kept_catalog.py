"""A large set that all processes of a job read together, once."""

import pytest
import tiny_run
from processes import run_job

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, pathlib, signal, sys, time
import jax
import tiny_run
from sana_jax.data import catalog, kept_catalog, records
from sana_jax.parallel import multihost
from sana_jax.training import loop
from sana_jax.training.termination import Preempted

job, data, workdir, told = sys.argv[1:]
data, workdir = pathlib.Path(data), pathlib.Path(workdir)
config = tiny_run.config(data / "pictures", data / "vae")
config.train.num_steps, config.train.sample_every = 2, 0
config.mesh.update(json.loads(job))
multihost.start(config.mesh)
kept_catalog.KEPT_FROM = 0
if told == "apart":  # each host has the set on a disk of its own, written at another time
    config.data.path = f"{config.data.path}-{jax.process_index()}"
read, numbers = catalog.read_shard, []

def noted(path, number, sized):
    numbers.append(number)
    if told == "once":
        if jax.process_index() == 1 and len(numbers) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # the service looks about once a second
    return read(path, number, sized)

catalog.read_shard = noted
try:
    loop.train(config, str(workdir))
except Preempted:
    print(json.dumps(["preempted", numbers]))
else:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    print(json.dumps([[line["loss"] for line in lines if "loss" in line], numbers]))
"""


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr("sana_jax.data.records.SHARD_BYTES", 12_000)
    tiny_run.write_data(tmp_path)
    assert len(shards(tmp_path / "pictures")) == 7
    return tmp_path


def shards(path):
    return sorted(path.glob("*.array_record"))


def test_each_shard_is_read_by_one_of_two_processes_which_end_together_when_one_is_told_to(data, tmp_path):
    first, second = run_job(SCRIPT, data, tmp_path / "run", "once", processes=2, devices=1)
    assert first[0] == second[0] == "preempted" and 0 < len(first[1]) < 4
    again = run_job(SCRIPT, data, tmp_path / "run", "never", processes=2, devices=1)
    read = [number for _, numbers in (first, second, *again) for number in numbers]
    assert sorted(read) == list(range(7)), "each once"
    assert not set(first[1]) & set(second[1])
    alone = run_job(SCRIPT, data, tmp_path / "alone", "never", processes=1, devices=2)
    assert again[0][0] == pytest.approx(alone[0][0], rel=1e-5) and len(again[0][0]) == 2
    assert len(list((tmp_path / "run" / "data").iterdir())) == 1


def test_hosts_with_copies_of_their_own_read_all_of_them(data, tmp_path):
    for number in range(2):
        copy = data / f"pictures-{number}"
        copy.mkdir()
        for file in (data / "pictures").iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    (one, first), (other, second) = run_job(SCRIPT, data, tmp_path / "run", "apart", processes=2, devices=1)
    assert one == other and set(first) == set(second) == set(range(7))
