"""A quantised transformer on four (fake) devices is the one on one device, and its codes are what travels."""

import pytest
from processes import run_script

SCRIPT = """
import json, re
import jax, jax.numpy as jnp, numpy as np
from tiny_pipeline import tiny_parts
from sana_jax.parallel import sharding
from sana_jax.parallel.mesh import make_mesh
from sana_jax.parallel.transformer import apply_transformer
from sana_jax.quantization import quantize_transformer

sharding.MIN_SHARDED = 2**10
module, params = tiny_parts().transformer
rng = np.random.default_rng(0)
inputs = [rng.standard_normal((4, 4, 4, 8)), np.full(4, 500.0), rng.standard_normal((4, 12, 32)), np.ones((4, 12))]
inputs = [jnp.asarray(x, jnp.float32) for x in inputs]

def run(params, *inputs):
    return apply_transformer(module, params, *inputs)

out = {}
for kind in ("int8", "fp8"):
    expected = np.asarray(jax.jit(run)(quantize_transformer(params, kind), *inputs))
    mesh = make_mesh(fsdp=2, seq=2)
    with jax.set_mesh(mesh):
        split = jax.device_put(params, sharding.shardings({"transformer": params}, mesh)["transformer"])
        split = quantize_transformer(split, kind)
        program = jax.jit(run).lower(split, *inputs).compile()
        error = np.abs(np.asarray(program(split, *inputs)) - expected).max() / np.abs(expected).max()
    gathered = re.findall(r"= (\\w+)\\[\\S* all-gather[(]", program.as_text())
    out[kind] = dict(error=float(error), gathered=gathered)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def four_devices():
    return run_script(SCRIPT, devices=4)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_on_four_devices_is_quantised_on_one(four_devices, kind):
    assert four_devices[kind]["error"] < 1e-5


def test_kernels_are_gathered_as_codes(four_devices):
    assert four_devices["int8"]["gathered"].count("s8") == 7  # XLA for CPU gathers float8 as float16
