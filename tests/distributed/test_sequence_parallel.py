"""The transformer with its tokens split over eight (fake) devices is the transformer on one, forward and backward."""

import pytest
from processes import run_script

SCRIPT = """
import dataclasses, json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.parallel import sharding
from sana_jax.parallel.mesh import make_mesh
from sana_jax.parallel.transformer import apply_transformer

assert jax.device_count() == 8
sharding.MIN_SHARDED = 2**10
config = TransformerConfig(
    sample_size=8, in_channels=4, out_channels=4, width=64, num_layers=2, attention_head_dim=16, num_cross_attention_heads=2,
    caption_channels=24, qk_norm=True, interpolation_scale=1.0, remat="full",
)
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
mask = jnp.arange(7) < jnp.asarray([7, 3, 1, 5])[:, None]
inputs = [normal(4, 8, 6, 4), jnp.asarray([3.0, 420.0, 999.0, 7.0]), normal(4, 7, 24), mask]
weights = normal(4, 8, 6, 4)

def make(config):
    module = SanaTransformer(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return module, jax.tree.map(lambda x: 0.2 * normal(*x.shape), shapes)

def loss(module, params, *inputs):
    velocity = apply_transformer(module, params, *inputs)
    return jnp.sum(weights * velocity**2), velocity

def difference(a, b):
    a, b = jax.device_get((a, b))
    return max(float(np.abs(x - y).max() / np.abs(x).max()) for x, y in zip(map(np.asarray, jax.tree.leaves(a)),
        map(np.asarray, jax.tree.leaves(b)), strict=True))

def collectives(compiled):
    pattern = r"= ([^=]*?) (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter|collective-broadcast)[a-z-]*[(]"
    return [(kind, [s for s in re.findall(r"\\[([0-9,]*)\\]", shapes)]) for shapes, kind in re.findall(pattern, compiled.as_text())]

def place(tree, mesh):
    split = jax.device_put({"transformer": tree}, sharding.shardings({"transformer": tree}, mesh))["transformer"]
    return split, [jax.device_put(x, NamedSharding(mesh, sharding.BATCH)) for x in inputs]

out = {}
variants = {"plain": config, "patch": dataclasses.replace(config, patch_size=2, sample_size=16)}
meshes = {"seq": dict(seq=8), "data": dict(data=2, seq=4), "all": dict(data=2, fsdp=2, seq=2), "patch": dict(data=2, seq=4)}
for name, axes in meshes.items():
    if name in ("seq", "patch"):
        module, params = make(variants["patch" if name == "patch" else "plain"])
        if name == "patch":
            inputs[0], weights = normal(4, 8, 4, 4), normal(4, 8, 4, 4)
        run = jax.value_and_grad(loss, argnums=1, has_aux=True)
        (_, velocity), gradient = jax.jit(run, static_argnums=0)(module, params, *inputs)
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
        split, arguments = place(params, mesh)
        places = jax.tree.map(lambda x: x.sharding, split)
        step = jax.jit(run, static_argnums=0, out_shardings=(None, places)).lower(module, split, *arguments).compile()
        (_, ours), ours_gradient = step(split, *arguments)
        out[name] = dict(velocity=difference(velocity, ours), gradient=difference(gradient, ours_gradient),
            backward=collectives(step))
        if name == "data":
            forward = jax.jit(loss, static_argnums=0).lower(module, split, *arguments).compile()
            out[name]["forward"] = collectives(forward)
out["parameters"] = sorted({",".join(map(str, x.shape[1:] if "blocks" in sharding.path_names(p) else x.shape))
    for p, x in jax.tree_util.tree_flatten_with_path(make(config)[1])[0]})

out["refusals"] = []
for changes, size, axes in (({}, 6, dict(seq=4, data=2)), ({"self_attention": "softmax"}, 8, dict(seq=4, data=2))):
    module = SanaTransformer(dataclasses.replace(config, **changes))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    latents = jax.ShapeDtypeStruct((4, size, 6, 4), jnp.float32)
    try:
        with jax.set_mesh(make_mesh(**axes)):
            jax.eval_shape(lambda p, x: apply_transformer(module, p, x, *inputs[1:]), shapes, latents)
    except ValueError as error:
        out["refusals"].append(str(error))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight_devices():
    # With MLIR's fusions, whose float32 sums are the closer ones.
    return run_script(SCRIPT, devices=8, XLA_FLAGS="--xla_backend_optimization_level=0")


@pytest.mark.parametrize("mesh", ["seq", "data", "all", "patch"])
def test_split_tokens_give_the_velocity_and_the_gradient_of_whole_ones(eight_devices, mesh):
    assert eight_devices[mesh]["velocity"] < 1e-5
    assert eight_devices[mesh]["gradient"] < 2e-5


@pytest.mark.parametrize("mesh", ["seq", "data"])
def test_without_fsdp_nothing_is_gathered_forward_or_backward(eight_devices, mesh):
    assert {kind for kind, _ in eight_devices[mesh]["backward"]} == {"all-reduce", "collective-permute"}


def test_with_fsdp_only_parameters_are_gathered(eight_devices):
    gathered = [shapes for kind, shapes in eight_devices["all"]["backward"] if kind == "all-gather"]
    halves = ["3,3,160"]  # of the depthwise kernel's gradient, which is made of a values' and a gates' part
    assert {shape for shapes in gathered for shape in shapes} <= {*eight_devices["parameters"], *halves}
    assert len(gathered) > 10
    kinds = {kind for kind, _ in eight_devices["all"]["backward"]}
    assert kinds <= {"all-reduce", "collective-permute", "all-gather", "reduce-scatter"}


def test_a_layer_adds_up_one_state_and_exchanges_one_row_each_way(eight_devices):
    """Per device 2 pictures of 2 rows of 6 tokens, 4 heads of 16; the layers are scanned, so that all stand here once."""
    forward = eight_devices["data"]["forward"]
    rows = [shapes for kind, shapes in forward if kind == "collective-permute"]
    assert rows == [["2,1,6,320"]] * 2
    sums = [sorted(shapes) for kind, shapes in forward if kind == "all-reduce"]
    assert sums.count(sorted(["2,4,16", "2,4,16,16"])) == 1
    assert all(shapes == [""] for shapes in sums if shapes != sorted(["2,4,16", "2,4,16,16"]))  # the loss


def test_what_cannot_be_split_is_an_error_with_the_fix(eight_devices):
    rows, softmax = eight_devices["refusals"]
    assert rows == "mesh.seq=4 does not divide the 6 rows of tokens. Use mesh.seq=3."
    assert softmax.endswith("Use mesh.seq=1, or self_attention='linear'.")
