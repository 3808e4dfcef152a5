"""Meshes over whole pods, whose chips are known without a TPU. Nothing is compiled."""

import pytest

pytest.importorskip("libtpu")

from sana_jax.aot.topologies import open_topology
from sana_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.tpu_aot


@pytest.mark.parametrize("pod", ["v5e:16x16", "v6e:16x16", "v5p:8x8x8", "v6e:16x16*2"])
@pytest.mark.parametrize("fsdp", [2, 8, 64])
def test_a_physical_axis_of_a_pod_may_be_split(pod, fsdp):
    topology = open_topology(pod)
    mesh = make_mesh(fsdp=fsdp, devices=topology.devices)
    assert mesh.shape == {"data": len(topology.devices) // fsdp, "fsdp": fsdp, "seq": 1}


def test_fsdp_stays_within_a_slice():
    mesh = make_mesh(fsdp=8, devices=open_topology("v6e:4x4*2").devices)
    slices = [[device.slice_index for device in row] for row in mesh.devices[:, :, 0]]
    assert all(len(set(row)) == 1 for row in slices) and len({row[0] for row in slices}) == 2
