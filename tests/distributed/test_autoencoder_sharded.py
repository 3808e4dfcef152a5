"""DC-AE with the rows of a picture split over four (fake) devices is DC-AE on one."""

import pytest
from processes import run_script

SCRIPT = """
import collections, json, re
import jax, jax.numpy as jnp, numpy as np
import test_autoencoder_strips as tiny
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.parallel import autoencoder as sharded
from sana_jax.parallel.mesh import make_mesh

assert jax.device_count() == 4
out = {}
run = {"decode": sharded.decode_sharded, "encode": sharded.encode_sharded}
for name, method, axes in (
    ("sana", "decode", dict(seq=4)), ("sana", "encode", dict(seq=4)), ("mix", "decode", dict(data=2, seq=2)),
    ("mix", "encode", dict(data=2, seq=2)),
):
    config, mesh = tiny.CONFIGS[name], make_mesh(**axes)
    params, (x, expected) = tiny.random_params(config), tiny.plain(config, method)
    found = run[method](Autoencoder(config), params, x, mesh)
    compiled = sharded._apply.lower(params, x, autoencoder=Autoencoder(config), mesh=mesh, method=method).compile()
    kinds = re.findall(
        r" (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter|collective-broadcast)[a-z-]*[(]",
        compiled.as_text(),
    )
    shards = sorted({shard.data.shape[:2] for shard in found.addressable_shards})
    error = float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())
    out[f"{name} {method}"] = dict(error=error, collectives=collections.Counter(kinds), shards=shards)

out["refusals"] = []
module, params = Autoencoder(tiny.SANA), tiny.random_params(tiny.SANA)
for call in (
    lambda: sharded.decode_sharded(module, params, jnp.zeros((1, 6, 2, 4)), make_mesh(seq=4)),
    lambda: sharded.encode_sharded(module, params, jnp.zeros((1, 48, 16, 3)), make_mesh(seq=4)),
    lambda: sharded.decode_sharded(module, params, jnp.zeros((1, 8, 2, 4)), make_mesh(data=2, seq=2)),
    lambda: sharded.decode_sharded(module, params, jnp.zeros((1, 4, 2, 4)), make_mesh(seq=4)),
):
    try:
        call()
    except ValueError as error:
        out["refusals"].append(str(error))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def four_devices():
    return run_script(SCRIPT, devices=4)


RUNS = {"sana decode": [2, 24], "sana encode": [2, 3], "mix decode": [1, 48], "mix encode": [1, 6]}


@pytest.mark.parametrize("run", RUNS)
def test_four_devices_give_what_one_gives(four_devices, run):
    assert four_devices[run]["error"] < 1e-5
    assert four_devices[run]["shards"] == [RUNS[run]]


@pytest.mark.parametrize("run", RUNS)
def test_neighbours_exchange_rows_and_nobody_gathers_activations(four_devices, run):
    assert set(four_devices[run]["collectives"]) == {"collective-permute", "all-reduce"}


def test_what_the_mesh_cannot_split_is_an_error_with_the_fix(four_devices):
    latents, picture, batch, few = four_devices["refusals"]
    assert "mesh.seq=4 does not divide the 6 rows of latents. Use mesh.seq=3." in latents
    assert "mesh.seq=4 does not divide the 6 rows of the picture's latents. Use mesh.seq=3." in picture
    assert "1 pictures cannot be split over mesh.data * mesh.fsdp = 2 devices" in batch
    assert "a device holds 1 rows and its neighbour needs 2. Use a smaller mesh.seq" in few  # for the 5x5 convolution
