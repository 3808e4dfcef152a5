"""Latents that are cached on one device, and trained on by all."""

import pytest
import tiny_run
from processes import run_script

SCRIPT = """
import json, pathlib, sys
import tiny_run
from sana_jax.training import loop

data, workdir = map(pathlib.Path, sys.argv[1:])
config = tiny_run.config(data / "pictures", data / "vae")
with config.unlocked():
    config.train.cache_latents, config.train.num_steps, config.train.sample_every = True, 1, 0
loop.train(config, str(workdir))
lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
print(json.dumps([line["loss"] for line in lines if "loss" in line]))
"""


def test_a_run_with_cached_latents_on_two_devices_has_the_loss_of_one(tmp_path):
    tiny_run.write_pictures(tmp_path / "pictures", 24)
    tiny_run.write_autoencoder(tmp_path / "vae")
    one, two = (run_script(SCRIPT, tmp_path, tmp_path / str(count), devices=count) for count in (1, 2))
    assert len(one) == 1 and two == pytest.approx(one, rel=1e-5)
