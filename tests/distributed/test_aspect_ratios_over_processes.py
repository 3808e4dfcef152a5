"""Pictures of several aspect ratios, trained on by several processes: all take the same size at the same step."""

import numpy as np
import pytest
import tiny_run
from processes import run_job, run_script


pytestmark = pytest.mark.slow

STEPS = 6
SCRIPT = """
import json, sys
import tiny_run
from sana_jax.parallel import multihost
from sana_jax.training import loop

*job, data, workdir = sys.argv[1:]
config = tiny_run.config(f"{data}/photos", f"{data}/vae")
with config.unlocked():
    config.model.sample_size, config.data.image_size, config.data.aspect_ratios = 8, 32, (0.6, 1.0)
    config.train.update(num_steps=6, sample_every=0)
    config.optimizer.adamw_eps = 1e-2  # else Adam turns the rounding of a gradient near zero into a whole step
    if job:
        config.mesh.update(json.loads(job[0]) | {"data": 2, "seq": 2})
        config.train.accumulate_steps = 2
multihost.start(config.mesh)
seen, put_batch = [], loop.sharding.put_batch
loop.sharding.put_batch = lambda batch, *rest: seen.append(list(next(iter(batch.values())).shape[1:3])) or put_batch(batch, *rest)
loop.train(config, workdir)
print(json.dumps(seen[:6]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_run.write_autoencoder(path / "vae")
    tiny_run.write_photographs(path / "photos", [(20, 20)] * 18 + [(18, 30)] * 24)
    return path


def test_processes_rows_and_parts_of_a_batch_change_no_loss_whatever_the_ratio(data, tmp_path):
    alone = run_script(SCRIPT, data, tmp_path / "alone", devices=1)
    together = run_job(SCRIPT, data, tmp_path / "together", processes=2, devices=2)
    assert together == [alone] * 2 and len({tuple(size) for size in alone}) == 2
    losses = [list(tiny_run.losses(tmp_path / name).values()) for name in ("alone", "together")]
    assert len(losses[0]) == STEPS
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
