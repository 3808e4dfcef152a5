"""A model that grows on several devices starts from the weights that it starts from on one."""

import numpy as np
import pytest
import tiny_run
from processes import run_script

from sana_jax.training import loop

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import jax
import numpy as np
import tiny_run
from sana_jax.training import loop

data, workdir, mesh = sys.argv[1:]
config = tiny_run.config(f"{data}/pictures", f"{data}/vae")
with config.unlocked():
    config.init_from, config.init_blocks = f"{data}/model", (1, 0)
    config.model.update(num_layers=4, width=256, num_cross_attention_heads=2)
    config.train.update(num_steps=0, sample_every=0)
    config.mesh.update(json.loads(mesh))
blocks = loop.train(config, workdir).params["transformer"]["blocks"]
kernel = blocks["self_attention"]["qkv"]["kernel"]
sums = [[float(np.sum(np.asarray(x, np.float64))), float(np.sum(np.asarray(x, np.float64) ** 2))] for x in jax.tree.leaves(blocks)]
print(json.dumps({"spec": list(map(str, kernel.sharding.spec)), "sums": sums}))
"""


def test_split_weights_grow_as_whole_ones(tmp_path):
    tiny_run.write_data(tmp_path)
    config = tiny_run.config(tmp_path / "pictures", tmp_path / "vae")
    with config.unlocked():
        config.model.update(width=256, num_cross_attention_heads=2)
        config.train.update(num_steps=1, sample_every=0)
    loop.train(config, str(tmp_path / "model"))
    alone = run_script(SCRIPT, tmp_path, tmp_path / "alone", "{}", devices=1)
    split = run_script(SCRIPT, tmp_path, tmp_path / "split", '{"fsdp": 4}', devices=4)
    assert "fsdp" in split["spec"]
    np.testing.assert_array_equal(split["sums"], alone["sums"])
