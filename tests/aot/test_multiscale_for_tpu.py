"""The kernels of DC-AE's further scales, compiled by XLA's TPU compiler on a machine without a TPU: alone, and in a block."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("libtpu")

from sana_jax.kernels.multiscale import api

from sana_jax.aot.topologies import open_topology
from sana_jax.models.autoencoder_blocks import EfficientViTBlock
from sana_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.tpu_aot
CALL = 'custom_call_target="tpu_custom_call"'
# Ragged rows and columns that bring their neighbours' along; the finest grid of a picture of 4096 pixels, in either dtype.
SHAPES = [(2, 35, 31, 1024, 0, "bfloat16"), (1, 512, 512, 512, 2, "bfloat16"), (1, 256, 256, 512, 2, "float32")]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_kernels_compile_forward_and_backward_and_are_what_the_platform_takes(topology):
    mesh = make_mesh(1, 1, 1, devices=open_topology(topology).devices[:1])

    def shape(*sizes, dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P()))

    inputs = []
    for batch, height, width, channels, row_padding, dtype in SHAPES:
        x = shape(batch, height, width, channels, dtype=dtype)
        depth, group = shape(1, 5, 5, channels, dtype=dtype), shape(1, channels // 32, 32, 32, dtype=dtype)
        g = shape(batch, height + 2 * row_padding - 4, width, channels, dtype=dtype)
        inputs.append(((x,), depth, group, (g,)))

    def run(inputs):
        results = []
        for (*arrays, g), (*_, row_padding, _) in zip(inputs, SHAPES, strict=True):
            layer = functools.partial(api.further_scale, row_padding=row_padding)
            island = jax.shard_map(layer, in_specs=P(), out_specs=P(), check_vma=False)
            value, vjp = jax.vjp(island, *arrays)
            results.append((value, vjp(g)))
        return results

    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(inputs).compile().as_text()
    assert text.count(CALL) == 2 * len(SHAPES)


def test_a_block_over_pictures_runs_its_kernels_on_every_chip():
    mesh = make_mesh(2, 2, 1, devices=open_topology("v5e:2x2").devices)
    block = EfficientViTBlock(scales=(5,), dtype=jnp.dtype("bfloat16"))
    x = jax.ShapeDtypeStruct((4, 32, 32, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    params = jax.eval_shape(block.init, jax.random.key(0), jnp.zeros(x.shape, x.dtype))
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=NamedSharding(mesh, P())), params)
    with jax.set_mesh(mesh):
        text = jax.jit(block.apply).lower(params, x).compile().as_text()
    # q, k and v of the further scale; state and reading of both scales; the gated convolution.
    assert text.count(CALL) == 3 + 2 * 2 + 1
    assert "all-" not in text
