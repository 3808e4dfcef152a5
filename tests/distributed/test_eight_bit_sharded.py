"""Eight-bit optimizer state on eight (fake) devices: what the update moves and needs, and its way to another mesh."""

import pytest
from processes import QUICK, run_script

SCRIPT = """
import json, math, re, sys
import jax, numpy as np, optax
from configs import base
from sana_jax.checkpoint import Checkpoints
from sana_jax.training.resume import make_record
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.parallel import sharding
from sana_jax.parallel.mesh import make_mesh
from sana_jax.training.optimizers.came import scale_by_came
from sana_jax.training.optimizers.eight_bit import eight_bit, encode
from sana_jax.training.program import make_program, restore_state
from sana_jax.training.task import Task
from sana_jax.weights.folder import abstract_params

assert jax.device_count() == 8
WIDTH, LAYERS = 256, 2
shapes = {"transformer": abstract_params(SanaTransformer(TransformerConfig(width=WIDTH, num_layers=LAYERS,
    num_cross_attention_heads=4, caption_channels=64)))}
rng = np.random.default_rng(0)
normal = lambda: jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
params, gradients = normal(), [normal() for _ in range(3)]
out = {"largest_statistic": LAYERS * 5 * WIDTH}

def collectives(compiled):
    pattern = r"= ([^=]*?) (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter|collective-broadcast)[a-z-]*[(]"
    return [(kind, max(math.prod(map(int, filter(None, s.split(",")))) for s in re.findall(r"\\[([0-9,]*)\\]", result)))
        for result, kind in re.findall(pattern, compiled.as_text())]

def put(tree, mesh):
    return jax.device_put(tree, sharding.shardings(tree, mesh))

def run(tx, mesh):
    with jax.set_mesh(mesh):
        placed = sharding.placed((shapes, jax.eval_shape(tx.init, shapes)), mesh)
        places = sharding.places(placed)
        update = jax.jit(tx.update, donate_argnums=1, out_shardings=places).lower(placed[0], placed[1]).compile()
        state = jax.jit(tx.init, out_shardings=places[1])(put(params, mesh))
        for gradient in gradients:
            step, state = update(put(gradient, mesh), state)
    return update, jax.device_get(step), state

def difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)

one, eight = make_mesh(devices=jax.devices()[:1]), make_mesh(fsdp=8)
for name, tx in {"came": eight_bit(scale_by_came()), "adamw": eight_bit(optax.scale_by_adam())}.items():
    update, step, state = run(tx, eight)
    _, alone, _ = run(tx, one)
    codes = [x for x in jax.tree.leaves(state) if x.dtype == np.uint8]
    out[name] = dict(collectives=collectives(update), difference=difference(step, alone), codes=len(codes),
        split=sum("fsdp" in x.sharding.spec for x in codes), temporary=update.memory_analysis().temp_size_in_bytes)
out["parameters"] = sum(4 * x.size // 8 for x in jax.tree.leaves(shapes))  # of a device

# Saved by eight devices, restored by 2 x 4, in the same form and in the other.
unused = Task(*[lambda *_: None] * len(Task._fields))
task = unused._replace(init=lambda key: jax.tree.map(jax.numpy.zeros_like, shapes), frozen={})
config = base.get_config()
config.optimizer.betas = (0.9, 0.999, 0.9999)

def shapes_of(name, mesh):
    config.optimizer.name = name
    return make_program(config, task, mesh).state

def random(shapes):
    arrays = jax.tree.map(lambda x: (200 * rng.random(x.shape)).astype(x.dtype), shapes)
    return jax.device_put(arrays, sharding.places(shapes))

def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, *jax.device_get((a, b)))))

for before, now in (("came8bit", "came8bit"), ("came", "came8bit")):
    with jax.set_mesh(eight):
        state = random(shapes_of(before, eight))
        with Checkpoints(f"{sys.argv[1]}/{before}", 2) as checkpoints:
            checkpoints.save(0, state, make_record(config, 0, eight))
    other = make_mesh(data=2, fsdp=4)
    with jax.set_mesh(other), Checkpoints(f"{sys.argv[1]}/{before}", 2) as checkpoints:
        wanted = shapes_of(now, other)
        restored = restore_state(checkpoints, before, config, task, other, wanted)
        as_wanted = jax.tree.map(lambda x, y: x.sharding == y.sharding and x.dtype == y.dtype, restored, wanted)
        expected = state if before == now else state._replace(opt_state=jax.jit(encode)(jax.device_get(state.opt_state)))
        out[f"restored from {before}"] = dict(as_wanted=all(jax.tree.leaves(as_wanted)), equal=equal(restored, expected))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    # The scheduler that is meant for speed on CPUs keeps the temporaries of all parameters at once.
    flags = f"{QUICK} --xla_cpu_enable_concurrency_optimized_scheduler=false"
    return run_script(SCRIPT, tmp_path_factory.mktemp("runs"), devices=8, XLA_FLAGS=flags)


def test_adams_update_moves_nothing_between_devices(found):
    assert found["adamw"]["collectives"] == []


def test_cames_update_sums_statistics_and_moves_nothing_else(found):
    kinds, sizes = zip(*found["came"]["collectives"], strict=True)
    assert set(kinds) == {"all-reduce"} and max(sizes) <= found["largest_statistic"]


@pytest.mark.parametrize("name", ["came", "adamw"])
def test_the_update_needs_less_than_the_parameters_take(found, name):
    assert found[name]["temporary"] < found["parameters"]


@pytest.mark.parametrize(("name", "codes"), [("came", 11), ("adamw", 22)])
def test_codes_are_split_as_their_parameters_are(found, name, codes):
    assert found[name]["codes"] == found[name]["split"] == codes


@pytest.mark.parametrize("name", ["came", "adamw"])
def test_eight_devices_update_as_one(found, name):
    assert found[name]["difference"] < 0.01  # a sum in another order may round a moment to the next code


def test_eight_bit_state_restores_onto_another_mesh_unchanged(found):
    assert found["restored from came8bit"] == {"as_wanted": True, "equal": True}


def test_float32_state_is_restored_and_converted_onto_another_mesh(found):
    assert found["restored from came"] == {"as_wanted": True, "equal": True}
