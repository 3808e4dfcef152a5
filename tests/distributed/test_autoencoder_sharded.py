"""DC-AE with the rows of a picture split over four (fake) devices is DC-AE on one."""

import pytest
from processes import run_script

SCRIPT = """
import collections, functools, json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding
import test_autoencoder_strips as tiny
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.parallel.autoencoder import apply_autoencoder
from sana_jax.parallel.mesh import make_mesh
from sana_jax.parallel.sharding import LATENTS

assert jax.device_count() == 4
out = {}
for name, method, axes in (
    ("sana", "decode", dict(seq=4)), ("sana", "encode", dict(seq=4)), ("mix", "decode", dict(data=2, seq=2)),
    ("mix", "encode", dict(data=2, seq=2)),
):
    config, mesh = tiny.CONFIGS[name], make_mesh(**axes)
    params, (x, expected) = tiny.random_params(config), tiny.plain(config, method)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(apply_autoencoder, Autoencoder(config), method=method))
        compiled = run.lower(params, jax.device_put(x, NamedSharding(mesh, LATENTS))).compile()
        found = run(params, jax.device_put(x, NamedSharding(mesh, LATENTS)))
    kinds = re.findall(
        r" (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter|collective-broadcast)[a-z-]*[(]",
        compiled.as_text(),
    )
    shards = sorted({shard.data.shape[:2] for shard in found.addressable_shards})
    error = float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())
    out[f"{name} {method}"] = dict(error=error, collectives=collections.Counter(kinds), shards=shards)

out["refusals"] = []
module, params = Autoencoder(tiny.SANA), tiny.random_params(tiny.SANA)
for x, method in (((1, 6, 2, 4), "decode"), ((1, 48, 16, 3), "encode"), ((1, 4, 2, 4), "decode")):
    try:
        with jax.set_mesh(make_mesh(seq=4)):
            jax.eval_shape(functools.partial(apply_autoencoder, module, method=method), params, jnp.zeros(x))
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
    latents, picture, few = four_devices["refusals"]
    assert "mesh.seq=4 does not divide the 6 rows of latents. Use mesh.seq=3." in latents
    assert "mesh.seq=4 does not divide the 6 rows of latents. Use mesh.seq=3." in picture
    assert "a device holds 1 rows and its neighbour needs 2. Use a smaller mesh.seq" in few  # for the 5x5 convolution
