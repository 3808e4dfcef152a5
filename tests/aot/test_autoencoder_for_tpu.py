"""The decoder over four chips as XLA's TPU compiler makes it, which leaves less to chance than the CPU's partitioner."""

import os
import re

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu")

from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.presets import dc_ae_f32c32_sana_1_1
from sana_jax.parallel.autoencoder import decode_sharded
from sana_jax.parallel.mesh import make_mesh
from sana_jax.weights.parts import abstract_params

pytestmark = pytest.mark.tpu_aot

SANA = dc_ae_f32c32_sana_1_1(
    encoder_block_out_channels=(16, 16, 16, 32, 32, 32),
    decoder_block_out_channels=(16, 16, 16, 32, 32, 32),
    decoder_layers_per_block=(1,) * 6,
    dtype="bfloat16",
)


def test_no_chip_gathers_activations(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", os.environ.get("ALLOW_MULTIPLE_LIBTPU_LOAD", "true"))
    mesh = make_mesh(seq=4, devices=topologies.get_topology_desc("v5p:2x2x1", platform="tpu").devices)

    def abstract(x, *spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec)))

    params = jax.tree.map(abstract, abstract_params(Autoencoder(SANA)))
    latents = abstract(jnp.zeros((1, 16, 16, 32)), None, "seq")
    decode = jax.jit(lambda params, x: decode_sharded(Autoencoder(SANA), params, x, mesh))
    compiled = decode.lower(params, latents).compile().as_text()
    kinds = re.findall(r" (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)[a-z-]*[(]", compiled)
    assert set(kinds) == {"all-reduce", "collective-permute"}
