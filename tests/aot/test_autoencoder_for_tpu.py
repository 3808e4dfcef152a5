"""DC-AE's decoder over four chips, as XLA's TPU compiler makes it."""

import functools
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
from sana_jax.parallel.autoencoder import apply_autoencoder
from sana_jax.parallel.mesh import make_mesh
from sana_jax.weights.parts import abstract_params

pytestmark = [pytest.mark.tpu_aot, pytest.mark.usefixtures("compiled_quickly")]

SANA = dc_ae_f32c32_sana_1_1(
    encoder_block_out_channels=(16, 16, 16, 32, 32, 32),
    decoder_block_out_channels=(16, 16, 16, 32, 32, 32),
    encoder_layers_per_block=(1,) * 6,
    decoder_layers_per_block=(1,) * 6,
    dtype="bfloat16",
)


@pytest.fixture(autouse=True)
def without_a_tpu(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", os.environ.get("ALLOW_MULTIPLE_LIBTPU_LOAD", "true"))


def abstract(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def test_no_chip_gathers_activations():
    mesh = make_mesh(seq=4, devices=topologies.get_topology_desc("v5p:2x2x1", platform="tpu").devices)
    params = jax.tree.map(lambda x: abstract(mesh, x.shape), abstract_params(Autoencoder(SANA)))
    latents = abstract(mesh, (1, 16, 16, 32), None, "seq")
    decode = jax.jit(functools.partial(apply_autoencoder, Autoencoder(SANA), method="decode"))
    with jax.set_mesh(mesh):
        compiled = decode.lower(params, latents).compile().as_text()
    kinds = re.findall(r" (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)[a-z-]*[(]", compiled)
    assert set(kinds) == {"all-reduce", "collective-permute"}
