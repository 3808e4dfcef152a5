"""The tables of sharding and the errors of a mesh, without devices."""

import dataclasses
import fnmatch
import functools
import logging

import jax
import pytest
from jax.sharding import PartitionSpec as P

from configs import base
from sana_jax.models import presets
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.controlnet import ControlNetConfig, SanaControlNet
from sana_jax.models.patch_gan import PatchDiscriminator
from sana_jax.models.text_encoder import TextEncoder
from sana_jax.models.transformer import SanaTransformer
from sana_jax.parallel import multihost, sharding
from sana_jax.parallel.mesh import make_mesh
from sana_jax.parallel.sharding import array_spec, path_names
from sana_jax.quantization import quantize_transformer
from sana_jax.training import lora
from sana_jax.weights.folder import abstract_params

MODELS = {
    "transformer": [presets.sana_600m(32), presets.sana_1600m(128), presets.sana15_4800m(32), presets.sprint_1600m(32)],
    "text_encoder": [presets.gemma2_2b(), presets.gemma3_270m()],
    "autoencoder": [
        presets.dc_ae_f32c32_sana_1_1(),
        presets.dc_ae_lite_f32c32_sana_1_1(),
        presets.dc_ae_f32c32_in_1_0(),
        presets.dc_ae_f128c512_in_1_0(),
    ],
}
MODULES = {"transformer": SanaTransformer, "text_encoder": TextEncoder, "autoencoder": Autoencoder}
QKV = ("transformer", "blocks", "self_attention", "qkv", "kernel")


def path(*names):
    return tuple(jax.tree_util.DictKey(name) for name in names)


def spec(names, shape, **axes):
    return array_spec(path(*names), shape, {"data": 1, "fsdp": 1, "seq": 1} | axes)


def parameters(model):
    for config in MODELS[model]:
        params = abstract_params(MODULES[model](config))
        yield from jax.tree_util.tree_flatten_with_path({model: params})[0]
        if model == "transformer":
            factors = jax.eval_shape(lambda params=params: lora.init(jax.random.key(0), params, 4, lora.LAYERS))
            yield from jax.tree_util.tree_flatten_with_path({model: factors})[0]
            params = jax.eval_shape(functools.partial(quantize_transformer, kind="int8"), params)
            yield from jax.tree_util.tree_flatten_with_path({model: params})[0]


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_stands_in_its_models_table_with_its_rank(model):
    used = set()
    for where, x in parameters(model):
        axes = sharding.logical_axes(path_names(where))
        assert axes is None or len(axes) == x.ndim, path_names(where)
        name, table = "/".join(path_names(where)[1:]), sharding.MODELS[model]
        used.add(next(pattern for pattern in table if fnmatch.fnmatchcase(name, pattern)))
    assert used == set(sharding.MODELS[model])


@pytest.mark.parametrize("model", MODELS)
def test_64_devices_split_every_large_parameter_of_the_public_sizes(model):
    for where, x in parameters(model):
        if x.size >= sharding.MUST_SHARD:
            assert "fsdp" in array_spec(where, x.shape, {"data": 2, "fsdp": 64, "seq": 1})


def test_the_discriminator_has_its_table():
    params = jax.eval_shape(
        PatchDiscriminator().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
    )
    for where, _ in jax.tree_util.tree_flatten_with_path({"discriminator": params["params"]})[0]:
        sharding.logical_axes(path_names(where))


def test_a_controlnet_has_its_table():
    shapes = abstract_params(SanaControlNet(ControlNetConfig()))
    for where, x in jax.tree_util.tree_flatten_with_path({"controlnet": shapes})[0]:
        axes = sharding.logical_axes(path_names(where))
        assert axes is None or len(axes) == x.ndim
        assert x.size < sharding.MUST_SHARD or "fsdp" in array_spec(where, x.shape, {"data": 2, "fsdp": 64, "seq": 1})


def test_the_residual_stream_is_what_fsdp_splits():
    assert spec(QKV, (20, 2240, 3, 2240), fsdp=64) == P(None, "fsdp")
    assert spec(("transformer", "blocks", "cross_attention", "out", "kernel"), (20, 64, 256), fsdp=8) == P(
        None, None, "fsdp"
    )


def test_what_the_optimizer_keeps_of_a_parameter_is_split_as_the_parameter_is():
    out = {"codes": (2, 256, 256), "scale": (2, 256, 16), "rows": (2, 256, 1), "columns": (2, 1, 256), "rms": (2,)}
    shapes = {"transformer": {"blocks": {"self_attention": {"out": {"kernel": out}}}}, "count": ()}
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x, "float32"), shapes, is_leaf=lambda x: isinstance(x, tuple))
    found = sharding.specs(tree, {"data": 1, "fsdp": 8, "seq": 1})
    split, whole = P(None, None, "fsdp"), P(None, None, None)
    expected = {"codes": split, "scale": split, "rows": whole, "columns": split, "rms": P()}
    assert found == {"transformer": {"blocks": {"self_attention": {"out": {"kernel": expected}}}}, "count": P()}


def test_where_the_first_choice_does_not_fit_the_next_is_taken():
    expand = ("transformer", "blocks", "feed_forward", "expand", "kernel")
    assert spec(expand, (2, 100, 512), fsdp=8) == P(None, None, "fsdp")


def test_a_mesh_axis_splits_one_dimension_of_a_parameter():
    expand = ("transformer", "blocks", "feed_forward", "expand", "kernel")
    assert spec(expand, (2, 256, 512), fsdp=8) == P(None, "fsdp")


def test_small_arrays_and_a_single_shard_stay_whole():
    assert spec(("transformer", "blocks", "self_attention", "out", "bias"), (20, 2240), fsdp=8) == P()
    assert spec(QKV, (2, 16, 3, 16), fsdp=8) == P()
    assert spec(QKV, (20, 2240, 3, 2240)) == P()


def test_a_large_weight_that_fsdp_cannot_split_is_an_error_with_the_fix():
    message = r"mesh.fsdp=128 divides no dimension of transformer/.*/kernel \[20, 2240, 3, 2240\] .*Use mesh.fsdp=64 and mesh.data=2"
    with pytest.raises(ValueError, match=message):
        spec(QKV, (20, 2240, 3, 2240), fsdp=128)


@pytest.mark.parametrize(
    ("axes", "fix"), [({"fsdp": 6}, "fsdp=2 and mesh.data=3"), ({"data": 5, "fsdp": 3}, "fsdp=1 .*=15")]
)
def test_the_mesh_that_is_proposed_has_as_many_devices_as_there_are(axes, fix):
    with pytest.raises(ValueError, match=f"Use mesh.{fix}"):
        spec(QKV, (20, 2048, 3, 2048), **axes)


def test_a_parameter_without_a_row_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="blocks/new/kernel of the transformer stands in no row of its LOGICAL_AXES"):
        spec(("transformer", "blocks", "new", "kernel"), (2, 512, 512), fsdp=8)


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


@dataclasses.dataclass(frozen=True)
class Device:
    """As far as a mesh asks; XLA numbers the machines of GPUs as slices."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "of a test"


def nodes_of(mesh):
    """The machines of each replica's devices."""
    return [{device.slice_index for device in replica.flat} for replica in mesh.devices]


def test_slices_that_do_not_divide_data_are_an_error_with_the_fix():
    devices = [Device(i, i, i // 4, platform="tpu") for i in range(8)]
    with pytest.raises(ValueError, match=r"mesh.data=1 is not a multiple of the 2 slices.* Use mesh.data=2"):
        make_mesh(data=1, fsdp=8, devices=devices)


def test_fsdp_and_seq_stay_within_a_node_of_gpus_where_they_fit(caplog):
    # Four nodes of eight GPUs, a process each, dealt out to the nodes in turn.
    devices = [Device(id=i, process_index=i, slice_index=i % 4) for i in range(32)]
    with caplog.at_level(logging.INFO, logger="absl"):
        assert nodes_of(make_mesh(fsdp=8, devices=devices)) == [{0}, {1}, {2}, {3}]
        assert nodes_of(make_mesh(fsdp=2, seq=2, devices=devices)) == [{0}] * 2 + [{1}] * 2 + [{2}] * 2 + [{3}] * 2
    assert "span" not in caplog.text


def test_fsdp_spans_nodes_of_gpus_where_it_is_larger_than_one_and_says_so(caplog):
    devices = [Device(id=i, process_index=i // 8, slice_index=i // 8) for i in range(32)]
    with caplog.at_level(logging.INFO, logger="absl"):
        mesh = make_mesh(fsdp=16, devices=devices)
    assert mesh.shape == {"data": 2, "fsdp": 16, "seq": 1} and nodes_of(mesh) == [{0, 1}, {2, 3}]
    assert "mesh.fsdp=16 times mesh.seq=1 span 2 nodes" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "host:1234"}, "mesh.num_processes, mesh.process_id is missing"),
        ({"coordinator": "host:1234", "num_processes": 2, "process_id": 2}, "mesh.process_id=2 is not from 0 to .*=1"),
        (
            {"num_processes": 2, "process_id": 0, "multihost": False},
            "num_processes, mesh.process_id is given and .*=False",
        ),
    ],
)
def test_a_job_named_in_part_is_an_error_before_anything_waits(fields, message):
    config = base.get_config().mesh
    config.update({"multihost": True} | fields)
    with pytest.raises(ValueError, match=message):
        multihost.start(config)
