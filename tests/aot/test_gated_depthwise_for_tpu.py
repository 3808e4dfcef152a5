"""The kernels of the Mix-FFN, compiled by XLA's TPU compiler on a machine without a TPU: alone, and in a split layer."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("libtpu")

from sana_jax.kernels.glu_mbconv import api, pallas_tpu

from sana_jax.aot.collectives import collectives
from sana_jax.aot.topologies import open_topology
from sana_jax.models.feed_forward import MixFFN
from sana_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.tpu_aot
CALL = 'custom_call_target="tpu_custom_call"'
# A ragged grid with its neighbours' rows; pictures of 4096 pixels, in float32, which takes the most room, and of 8192.
SHAPES = [(2, 35, 31, 2880, 0, "bfloat16"), (1, 128, 128, 5600, 1, "float32"), (1, 256, 256, 5600, 1, "bfloat16")]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_kernels_compile_forward_and_backward_and_are_what_the_platform_takes(topology):
    mesh = make_mesh(1, 1, 1, devices=open_topology(topology).devices[:1])

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P()))

    inputs = []
    for batch, height, width, channels, row_padding, dtype in SHAPES:
        grid = shape(batch, height, width, channels, dtype=dtype)
        g = shape(batch, height - 2 * (1 - row_padding), width, channels, dtype=dtype)
        inputs.append((grid, grid, shape(3, 3, 2 * channels), shape(2 * channels), g))

    def run(inputs):
        results = []
        for (*arrays, g), (*_, row_padding, _) in zip(inputs, SHAPES, strict=True):
            layer = functools.partial(api.gated_depthwise, row_padding=row_padding)
            island = jax.shard_map(layer, in_specs=P(), out_specs=P(), check_vma=False)
            value, vjp = jax.vjp(island, *arrays)
            results.append((value, vjp(g)))
        return results

    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(inputs).compile().as_text()
    assert text.count(CALL) == 2 * len(SHAPES)


def test_in_layers_over_pictures_the_kernels_run_on_every_chip_and_keep_no_convolved_grids(monkeypatch):
    mesh = make_mesh(2, 2, 1, devices=open_topology("v5e:2x2").devices)
    layer, layers, hidden = MixFFN(1280, jnp.dtype("bfloat16")), 6, 1280
    x = jax.ShapeDtypeStruct((8, 64, 64, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros(x.shape, x.dtype))
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=NamedSharding(mesh, P())), params)

    def loss(params, x):
        """As the blocks of a model: one loop forward, one backward, and what must be kept in between."""

        def body(x, _):
            return x + layer.apply(params, x), None

        return jax.lax.scan(body, x, None, length=layers)[0].astype(jnp.float32).sum()

    def compiled():
        with jax.set_mesh(mesh):
            return jax.jit(jax.grad(loss)).lower(params, x).compile()

    with_kernels = compiled()
    text = with_kernels.as_text()
    assert text.count(CALL) == 2
    assert {found.kind for found in collectives(text)} <= {"all-reduce"}, "of the weights' gradients"
    monkeypatch.setattr(pallas_tpu, "refusal", lambda *arrays, **options: "it is compared with XLA's form")
    without = compiled()
    assert CALL not in without.as_text()
    kept, kept_without = (program.memory_analysis().temp_size_in_bytes for program in (with_kernels, without))
    convolved = layers * 2 * 64 * 64 * 2 * hidden * 2  # bytes, of a chip's two pictures
    assert kept < kept_without - 0.8 * convolved
