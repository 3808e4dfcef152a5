"""A LoRA that trains on several devices, its model split over them, has the losses that it has on one."""

import numpy as np
import pytest
import tiny_run
from processes import run_script

from sana_jax.training import loop, lora

pytestmark = pytest.mark.slow

STEPS = 4
SCRIPT = """
import json, sys
import jax
import tiny_run
from sana_jax.training import loop

data, workdir, *mesh = sys.argv[1:]
config = tiny_run.config(f"{data}/pictures", f"{data}/vae")
with config.unlocked():
    config.init_from = config.text_encoder.path = f"{data}/model"
    config.text_encoder.mode = "frozen"
    config.lora.update(rank=4, layers=(*config.lora.layers, "feed_forward/expand", "feed_forward/project"))
    config.train.update(num_steps=4, sample_every=0)
    config.optimizer.update(learning_rate=0.01, adamw_eps=1e-2)  # else Adam turns rounding into whole steps
    config.mesh.update(json.loads(mesh[0]) if mesh else {})
load_frozen = []
make_task = loop.make_task
def noted(*args):
    task = make_task(*args)
    return task._replace(load_frozen=lambda places: load_frozen.append(task.load_frozen(places)) or load_frozen[-1])
loop.make_task = noted
state = loop.train(config, workdir)
specs = jax.tree.map(lambda x: list(map(str, x.sharding.spec)), load_frozen[0]["transformer"]["blocks"]["self_attention"]["qkv"])
print(json.dumps({"kernel": specs["kernel"], "replicated": [x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params)]}))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_run.write_data(path)
    config = tiny_run.config(path / "pictures", path / "vae")
    config.train.num_steps, config.train.sample_every = 1, 0
    loop.train(config, str(path / "model"))
    return path


def test_a_split_model_and_split_rows_change_no_loss(data, tmp_path):
    run_script(SCRIPT, data, tmp_path / "alone", devices=1)
    found = run_script(SCRIPT, data, tmp_path / "split", '{"fsdp": 2, "seq": 2}', devices=4)
    assert "fsdp" in found["kernel"] and all(found["replicated"]), "the model is split, the factors are not"
    assert len(found["replicated"]) == 2 * len(lora.LAYERS)
    losses = [list(tiny_run.losses(tmp_path / name).values()) for name in ("alone", "split")]
    assert len(losses[0]) == STEPS and len(set(losses[0])) == STEPS
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
