"""A ControlNet that trains on several devices, its model split over them, has the losses that it has on one."""

import numpy as np
import pytest
import tiny_run
from processes import run_script

from sana_jax.training import loop

pytestmark = pytest.mark.slow

STEPS = 4
SCRIPT = """
import json, sys
import jax
import tiny_run
from sana_jax.parallel import sharding
from sana_jax.training import loop

sharding.MIN_SHARDED = 2**10
data, workdir, *mesh = sys.argv[1:]
config = tiny_run.config(f"{data}/guided", f"{data}/vae")
with config.unlocked():
    config.init_from = config.text_encoder.path = f"{data}/model"
    config.text_encoder.mode = "frozen"
    config.controlnet.update(num_layers=1, wiring="original")  # which reads the stream of the first block too
    config.train.update(num_steps=4, sample_every=4, accumulate_steps=2)
    config.optimizer.update(learning_rate=0.01, adamw_eps=1e-2)  # else Adam turns rounding into whole steps
    config.mesh.update(json.loads(mesh[0]) if mesh else {})
state = loop.train(config, workdir)
spec = state.params["controlnet"]["blocks"]["residual"]["kernel"].sharding.spec
print(json.dumps({"residual": list(map(str, spec))}))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_run.write_data(path)
    tiny_run.write_photographs(path / "guided", [(16, 16)] * 12, control=True)
    config = tiny_run.config(path / "pictures", path / "vae")
    config.train.num_steps, config.train.sample_every = 1, 0
    loop.train(config, str(path / "model"))
    return path


def test_split_copies_and_split_rows_change_no_loss(data, tmp_path):
    run_script(SCRIPT, data, tmp_path / "alone", devices=1)
    found = run_script(SCRIPT, data, tmp_path / "split", '{"fsdp": 2, "seq": 2}', devices=4)
    assert "fsdp" in found["residual"]
    losses = [list(tiny_run.losses(tmp_path / name).values()) for name in ("alone", "split")]
    assert len(losses[0]) == STEPS and len(set(losses[0])) == STEPS
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    drawn = [
        [line["all_loss"] for line in tiny_run.metrics(tmp_path / name) if "all_loss" in line]
        for name in ("alone", "split")
    ]
    np.testing.assert_allclose(drawn[1], drawn[0], rtol=1e-4)
