"""The kernels of linear attention, compiled by XLA's TPU compiler on a machine without a TPU; and all kernels in a split model."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

pytest.importorskip("libtpu")

from sana_jax.kernels.glu_mbconv import pallas_tpu as gated_depthwise
from sana_jax.kernels.linear_attention import api, pallas_tpu

from sana_jax.aot.collectives import collectives, totals
from sana_jax.aot.topologies import open_topology
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.parallel import sharding
from sana_jax.parallel.mesh import make_mesh
from sana_jax.parallel.transformer import apply_transformer

pytestmark = pytest.mark.tpu_aot
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# Ragged tokens and lanes in float32, which takes the most room on the chip; pictures of 4096 and 8192 pixels.
SHAPES = [(2, 1000, 2240, "float32"), (1, 16384, 1152, "bfloat16"), (1, 65536, 2240, "bfloat16")]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_kernels_compile_forward_and_backward_and_are_what_the_platform_takes(topology):
    mesh = make_mesh(1, 1, 1, devices=open_topology(topology).devices[:1])
    place = NamedSharding(mesh, PartitionSpec())
    inputs = [[jax.ShapeDtypeStruct(shape, dtype, sharding=place)] * 4 for *shape, dtype in SHAPES]

    def run(inputs):
        attention = jax.shard_map(
            functools.partial(api.linear_attention, head_dim=32),
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        results = []
        for q, k, v, g in inputs:
            value, vjp = jax.vjp(attention, q, k, v)
            results.append((value, vjp(g)))
        return results

    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(inputs).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 4 * len(SHAPES)


def test_in_a_split_model_the_kernels_add_no_collectives(monkeypatch):
    config = TransformerConfig(
        sample_size=16,
        width=256,
        num_layers=2,
        num_cross_attention_heads=4,
        caption_channels=64,
        remat="full",
        dtype="bfloat16",
    )
    module = SanaTransformer(config)
    inputs = (jnp.zeros((8, 16, 16, 32)), jnp.zeros(8), jnp.zeros((8, 16, 64)), jnp.ones((8, 16), bool))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    mesh = make_mesh(2, 2, 2, devices=open_topology("v5e:2x4").devices)
    places = sharding.shardings({"transformer": shapes}, mesh)["transformer"]
    params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    batch = NamedSharding(mesh, sharding.BATCH)
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch) for x in inputs]

    def compiled():
        gradient = jax.grad(lambda params, *inputs: jnp.square(apply_transformer(module, params, *inputs)).sum())
        with jax.set_mesh(mesh):
            return jax.jit(gradient, out_shardings=places).lower(params, *inputs).compile().as_text()

    with_kernels = compiled()
    for kernels in (pallas_tpu, gated_depthwise):
        monkeypatch.setattr(kernels, "refusal", lambda *_, **__: "compared with XLA's form")
    without = compiled()
    assert "tpu_custom_call" in with_kernels and "tpu_custom_call" not in without
    ours, theirs = (totals(collectives(text)) for text in (with_kernels, without))
    assert ours.keys() <= theirs.keys()
    assert sum(total.sent for total in ours.values()) <= 1.02 * sum(total.sent for total in theirs.values())
