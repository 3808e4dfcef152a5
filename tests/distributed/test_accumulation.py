"""Gradients accumulated on eight (fake) devices: the whole batch's update, without moving activations."""

import pytest
from processes import run_script

SCRIPT = """
import json, re
import jax, jax.numpy as jnp, numpy as np, optax
from sana_jax.diffusion import flow
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.parallel import sharding
from sana_jax.parallel.mesh import make_mesh
from sana_jax.training.state import init_state
from sana_jax.training.step import make_step, split_each

assert jax.device_count() == 8
sharding.MIN_SHARDED = 2**10
config = TransformerConfig(
    sample_size=4, in_channels=4, out_channels=4, width=64, num_layers=2, attention_head_dim=16, num_cross_attention_heads=2,
    caption_channels=24, remat="full",
)
module, tx = SanaTransformer(config), optax.adam(1e-3, eps=1e-2)
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
batch = {"latents": normal(32, 4, 4, 4), "text": normal(32, 6, 24)}

def loss(params, frozen, batch, keys, step):
    keys_sigma, keys_noise = split_each(keys, 2)
    sigma, timesteps = flow.sample_sigmas(keys_sigma, 3.0)
    noise = jax.vmap(lambda key: jax.random.normal(key, (4, 4, 4)))(keys_noise)
    noisy, mask = flow.interpolate(batch["latents"], noise, sigma), jnp.ones(batch["text"].shape[:2])
    velocity = module.apply({"params": params["transformer"]}, noisy, timesteps, batch["text"], mask)
    mean = jnp.mean(flow.flow_loss(velocity, batch["latents"], noise))
    return mean, {"loss": mean}

shapes = jax.eval_shape(module.init, jax.random.key(0), batch["latents"], jnp.zeros(32), batch["text"], jnp.ones((32, 6)))
params = {"transformer": jax.tree.map(lambda x: 0.2 * normal(*x.shape), shapes["params"])}

def collectives(compiled):
    pattern = r"= ([^=]*?) (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter|collective-broadcast)[a-z-]*[(]"
    found = re.findall(pattern, compiled.as_text())
    return [(kind, shape) for shapes, kind in found for shape in re.findall(r"\\[([0-9,]*)\\]", shapes)]

out = {}
mesh = make_mesh(data=2, fsdp=4)
with jax.set_mesh(mesh):
    state = init_state(params, tx, with_ema=True)
    places = sharding.shardings(state, mesh)
    state, split = jax.device_put((state, batch), (places, jax.sharding.NamedSharding(mesh, sharding.BATCH)))
    results = {}
    for parts in (1, 4):
        step = make_step(loss, tx, lambda step: 1e-3, seed=0, decay=0.9, accumulate=parts, skip_nonfinite=True)
        compiled = jax.jit(step, out_shardings=(places, None)).lower(state, {}, split).compile()
        out[parts] = {"collectives": collectives(compiled), "temporary": compiled.memory_analysis().temp_size_in_bytes}
        now = state
        for _ in range(3):
            now, metrics = compiled(now, {}, split)
        results[parts] = jax.device_get((now, metrics))
        loops = [line for line in compiled.as_text().splitlines() if re.search(r"= [(].*[)] while[(]", line)]
        out[parts]["carried"] = sorted({shape for line in loops for shape in re.findall(r"f32\\[([0-9,]*)\\]", line.split(" while(")[0])})
pairs = zip(*map(jax.tree.leaves, (results[1], results[4])), strict=True)
out["difference"] = max(float(np.abs(np.float64(a) - b).max() / max(np.abs(a).max(), 1e-6)) for a, b in pairs)
leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
out["parameters"] = sorted({",".join(map(str, x.shape[1:] if sharding.is_scanned(p) else x.shape)) for p, x in leaves})
split = [(path, x) for path, x in leaves if "fsdp" in x.sharding.spec]
out["shards"] = sorted(",".join(map(str, x.sharding.shard_shape(x.shape))) for _, x in split)
out["stacked"] = sorted(",".join(map(str, x.shape)) for path, x in split if sharding.is_scanned(path))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight_devices():
    return run_script(SCRIPT, devices=8)


def test_accumulated_updates_and_averages_are_those_of_the_whole_batch(eight_devices):
    # Second moments are squares: of a rounding of the gradients they have twice as much.
    assert eight_devices["difference"] < 2e-5


@pytest.mark.parametrize("parts", ["1", "4"])
def test_only_parameters_are_gathered_and_nothing_is_exchanged(eight_devices, parts):
    found = eight_devices[parts]["collectives"]
    assert {kind for kind, _ in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = {shape.removeprefix("1,") for kind, shape in found if kind == "all-gather"}
    assert gathered <= {*eight_devices["parameters"], "3,3,160"}  # halves of the depthwise kernel's gradient


def test_sums_of_gradients_are_split_as_their_parameters(eight_devices):
    carried = set(eight_devices["4"]["carried"])
    assert len(eight_devices["stacked"]) > 5
    assert set(eight_devices["shards"]) <= carried
    assert not set(eight_devices["stacked"]) & carried


def test_a_quarter_of_the_batch_at_a_time_takes_less_than_half_of_the_memory(eight_devices):
    assert eight_devices["4"]["temporary"] < 0.5 * eight_devices["1"]["temporary"]
