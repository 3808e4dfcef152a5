"""The sharding rule and the errors of a mesh, without devices."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from sana_jax.parallel.mesh import make_mesh
from sana_jax.parallel.sharding import array_spec


def path(*names):
    return tuple(jax.tree_util.DictKey(name) for name in names)


def test_the_largest_dimension_that_fsdp_divides_is_split():
    assert array_spec(path("proj"), (256, 512), 8) == P(None, "fsdp")
    assert array_spec(path("proj"), (512, 256), 8) == P("fsdp")
    assert array_spec(path("proj"), (256, 513), 8) == P("fsdp")


def test_the_layer_axis_of_scanned_blocks_is_never_split():
    assert array_spec(path("transformer", "blocks", "kernel"), (4096, 64, 32), 8) == P(None, "fsdp")
    assert array_spec(path("opt_state", "mu", "layers", "kernel"), (4096, 3, 33), 8) == P()


def test_small_arrays_and_a_single_shard_stay_whole():
    assert array_spec(path("bias"), (64,), 8) == P()
    assert array_spec(path("proj"), (1024, 1024), 1) == P()


def test_a_large_weight_that_fsdp_cannot_split_is_an_error_with_the_fix():
    message = r"mesh.fsdp=128 divides no dimension of blocks/kernel \[20, 2240, 5600\] .*Use mesh.fsdp=64"
    with pytest.raises(ValueError, match=message):
        array_spec(path("blocks", "kernel"), (20, 2240, 5600), 128)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"fsdp": 3}, r"mesh.fsdp=3 times mesh.seq=1 does not divide the 1 devices"),
        ({"data": 2}, r"mesh.data=2, mesh.fsdp=1, mesh.seq=1 need 2 devices, there are 1. Use mesh.data=-1"),
        ({"seq": 0}, r"mesh.seq=0: an axis has at least one device"),
    ],
)
def test_a_mesh_that_the_machine_does_not_have_is_an_error(axes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**axes, devices=jax.devices()[:1])
