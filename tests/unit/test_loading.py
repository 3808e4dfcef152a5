"""Loading at size: headers first, one parameter at a time, of each process its part only; converted weights kept."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from processes import run_script
from tiny_pipeline import tiny_parts

import sana_jax
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.weights import cache, layout, parts
from sana_jax.weights import transformer as transformer_weights
from sana_jax.weights.placement import default_device
from sana_jax.weights.stored import StoredTensor
from sana_jax.weights.transformer import patch_form

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path):
    sana_jax.save_transformer(*tiny_parts().transformer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def reads(monkeypatch):
    """Rows and bytes of every read of a tensor's numbers."""
    log, plain = [], StoredTensor.__getitem__

    def logged(self, rows):
        out = plain(self, rows)
        log.append((rows, out.nbytes))
        return out

    monkeypatch.setattr(StoredTensor, "__getitem__", logged)
    return log


def stored(path, array):
    array = np.ascontiguousarray(array)
    path.write_bytes(b"head" + array.tobytes())
    return StoredTensor(path, 4, array.shape, array.dtype)


def assert_same(params, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, expected)


def test_a_stored_tensor_reads_the_rows_asked_for(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    tensor = stored(tmp_path / "x", array)
    np.testing.assert_array_equal(tensor[...], array)
    np.testing.assert_array_equal(tensor[1:3], array[1:3])
    assert tensor[4:].shape == (0, 3, 2) and tensor.nbytes == 96
    with pytest.raises(TypeError, match="not 0"):
        tensor[0]


def test_a_file_that_shrinks_after_its_header_was_read_is_named(tmp_path):
    tensor = stored(tmp_path / "x", np.zeros(8))
    (tmp_path / "x").write_bytes(b"head")
    with pytest.raises(ValueError, match="x .4 bytes. is truncated: it ends 64 bytes before"):
        tensor[...]


FORMS = {
    "same": (layout.SAME, (6, 4), 0),
    "linear": (layout.LINEAR, (6, 4), 1),
    "convolution": (layout.CONV, (6, 4, 3, 5), 3),
    "pointwise": (layout.POINTWISE, (6, 4, 1, 1), 1),
    "depthwise": (layout.DEPTHWISE, (6, 1, 3, 3), 2),
    "patch": (patch_form(2), (6, 4, 2, 2), 1),
    "grouped": (layout.grouped_pointwise(3), (6, 4, 1, 1), None),  # its first axis becomes two of ours
}


@pytest.mark.parametrize("form,shape,axis", FORMS.values(), ids=FORMS)
def test_a_part_in_our_form_reads_only_its_rows_of_the_file(form, shape, axis, tmp_path, reads):
    array = np.random.default_rng(0).normal(size=shape)
    whole = form.ours(array)
    assert form.first_axis(shape) == axis
    box = tuple(slice(n // 3, n - n // 4) for n in whole.shape)
    np.testing.assert_array_equal(form.part(stored(tmp_path / "x", array), box), whole[box])
    rows = shape[0] if axis is None else box[axis].stop - box[axis].start
    assert [nbytes for _, nbytes in reads] == [rows * array[0].nbytes]


@pytest.mark.parametrize("join,axis", [("concatenate", -1), ("concatenate", 0), ("stack", 1), ("stack", 0)])
def test_any_part_of_a_joined_and_stacked_parameter_is_that_part_of_the_whole(join, axis, reads, tmp_path):
    entry = layout.Entry("x", ("a.{layer}", "b.{layer}"), layout.LINEAR, layers=3, axis=axis, join=join)
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(6, 4)).astype(np.float32) for name in entry.public_names()}
    combine = functools.partial(getattr(np, join), axis=axis)
    expected = np.stack([combine([arrays[f"{x}.{i}"].T for x in "ab"]) for i in range(3)])
    assert entry.public_shapes(expected.shape) == {name: (6, 4) for name in arrays}
    tensors = {name: stored(tmp_path / name, array) for name, array in arrays.items()}
    np.testing.assert_array_equal(entry.gather(tensors, expected.shape), expected)
    reads.clear()
    box = (slice(1, 2), *(slice(n // 3, max(n // 3 + 1, n - n // 3)) for n in expected.shape[1:]))
    np.testing.assert_array_equal(
        entry.gather(tensors, expected.shape, jnp.bfloat16, box), expected[box].astype(jnp.bfloat16)
    )
    assert len(reads) <= 2  # one layer's


def test_a_parameter_comes_back_from_every_dtype_it_is_stored_in(tmp_path):
    for dtype in ("float32", "float16", "bfloat16"):
        sana_jax.save_transformer(*tiny_parts().transformer, tmp_path / dtype, dtype=dtype)
        for wanted in ("float32", "bfloat16"):
            expected = jax.tree.map(
                lambda x, dtype=dtype, wanted=wanted: np.asarray(x, jnp.dtype(dtype)).astype(jnp.dtype(wanted)),
                tiny_parts().transformer[1],
            )
            assert_same(sana_jax.load_transformer(tmp_path / dtype, wanted)[1], expected)


DAMAGES = {
    "no_bytes": lambda raw: b"",
    "cut_in_the_header": lambda raw: raw[:100],
    "cut_in_the_last_tensor": lambda raw: raw[:-1],
    "bytes_after_the_end": lambda raw: raw + b"x",
    "header_length_of_nonsense": lambda raw: b"\xff" * 8 + raw[8:],
    "header_that_is_no_json": lambda raw: raw[:8] + b"}" + raw[9:],
    "unknown_dtype": lambda raw: raw.replace(b'"F32"', b'"F33"', 1),
    "other_dtype": lambda raw: raw.replace(b'"F32"', b'"F64"', 1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_before_anything_is_read(damage, model, reads):
    raw = (model / FILE).read_bytes()
    (model / FILE).write_bytes(damage(raw))
    with pytest.raises(ValueError, match=f"{model / FILE} .* is truncated or damaged"):
        sana_jax.load_transformer(model)
    assert not reads


def test_all_that_does_not_fit_is_listed_before_anything_is_read(model, reads):
    tensors = safetensors.numpy.load_file(model / FILE)
    del tensors["proj_out.weight"]
    tensors["proj_out.scale"] = np.zeros(3, np.float32)
    tensors["transformer_blocks.1.ff.conv_point.weight"] = np.zeros(
        (64, 160, 3, 3), np.float32
    )  # taps would be dropped
    tensors["transformer_blocks.0.attn1.to_q.weight"] = np.zeros((64, 32), np.float32)
    safetensors.numpy.save_file(tensors, model / FILE)
    with pytest.raises(ValueError) as error:
        sana_jax.load_transformer(model)
    assert str(error.value).splitlines()[1:] == [
        "  missing proj_out.weight (nearest: proj_out.scale)",
        "  surplus proj_out.scale (nearest: proj_out.weight)",
        "  misshapen transformer_blocks.0.attn1.to_q.weight: is [64, 32], the configuration wants [64, 64]",
        "  misshapen transformer_blocks.1.ff.conv_point.weight: is [64, 160, 3, 3], the configuration wants [64, 160, 1, 1]",
    ]
    assert not reads


def rename(file, new):
    safetensors.numpy.save_file({new(name): value for name, value in safetensors.numpy.load_file(file).items()}, file)


def test_a_prefix_that_all_names_share_is_said_once(model):
    rename(model / FILE, lambda name: name if name == "proj_out.bias" else f"module.{name}")
    count = len(safetensors.numpy.load_file(model / FILE)) - 1
    with pytest.raises(ValueError) as error:
        sana_jax.load_transformer(model)
    assert str(error.value).splitlines() == [
        f"{model} does not fit the configuration ({2 * count} problems):",
        f"  all {count} surplus names are missing ones after 'module.'; write the file without it",
    ]


def test_one_name_besides_those_with_a_prefix_is_still_listed(model):
    rename(model / FILE, lambda name: "module.typo" if name == "proj_out.bias" else f"module.{name}")
    with pytest.raises(ValueError, match="surplus module.caption_norm.weight .nearest: caption_norm.weight."):
        sana_jax.load_transformer(model)
    rename(model / FILE, lambda name: "module.proj_out.bias" if name == "module.typo" else name)
    tensors = safetensors.numpy.load_file(model / FILE)
    del tensors["module.proj_out.bias"]
    safetensors.numpy.save_file(tensors, model / FILE)
    with pytest.raises(ValueError) as error:
        sana_jax.load_transformer(model)
    assert str(error.value).splitlines()[2:] == ["  missing proj_out.bias"]


def test_of_very_many_misfits_the_first_are_named_and_the_rest_are_counted(monkeypatch):
    module = SanaTransformer(TransformerConfig(width=64, num_layers=60, num_cross_attention_heads=4))
    entries = transformer_weights.entries(module.config)
    flat = traverse_util.flatten_dict(parts.abstract_params(module), sep="/")
    shapes = {name: shape for e in entries for name, shape in e.public_shapes(tuple(flat[e.path].shape)).items()}
    renamed = {
        name.replace("transformer_blocks", "blocks"): np.broadcast_to(np.float32(0), s) for name, s in shapes.items()
    }
    count = sum("transformer_blocks" in name for name in shapes)
    lookups, plain = [], layout.difflib.get_close_matches
    monkeypatch.setattr(layout.difflib, "get_close_matches", lambda *a, **k: lookups.append(a) or plain(*a, **k))
    with pytest.raises(ValueError) as error:
        layout.check(entries, renamed, parts.abstract_params(module))
    assert len(lookups) == 40  # each takes time in proportion to the number of names
    first, *lines = str(error.value).splitlines()
    assert f"({2 * count} problems)" in first and count == 1140 and len(lines) == 42
    assert lines[0] == ("  missing transformer_blocks.0.attn1.to_k.weight (nearest: blocks.0.attn1.to_k.weight)")
    assert lines[20] == f"  and {count - 20} more missing" and lines[41] == f"  and {count - 20} more surplus"


def test_a_tensor_in_two_shards_is_an_error(model):
    sana_jax.save_transformer(*tiny_parts().transformer, model, max_shard_bytes=100_000)
    first, second = sorted(model.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=f"stands in both {first} and {second.name}"):
        sana_jax.load_transformer(model)


def test_parameters_go_to_the_default_device_and_may_leave_it(model):
    params = sana_jax.load_transformer(model, shardings=default_device)[1]
    assert all(isinstance(x, jax.Array) and not x.committed for x in jax.tree.leaves(params))
    assert_same(params, tiny_parts().transformer[1])


def test_a_tree_of_shardings_must_have_every_parameter(model):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = jax.tree.map(lambda x: here, tiny_parts().transformer[1])
    params = sana_jax.load_transformer(model, shardings=tree)[1]
    assert_same(params, tiny_parts().transformer[1])
    del tree["proj_out"]["bias"]
    with pytest.raises(ValueError, match=r"shardings has nothing for proj_out/bias \[8\]"):
        sana_jax.load_transformer(model, shardings=tree)


def test_progress_ends_at_all_bytes(model):
    calls = []
    sana_jax.load_transformer(model, progress=lambda done, total: calls.append((done, total)))
    total = sum(x.nbytes for x in jax.tree.leaves(tiny_parts().transformer[1]))
    assert calls[-1] == (total, total) and [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_nothing_of_a_load_that_fails_is_kept_by_its_traceback(model):
    placed = []

    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    def remember(path, shape):
        placed.append(path)

    with pytest.raises(KeyboardInterrupt) as error:
        sana_jax.load_transformer(model, shardings=remember, progress=stop)
    frames = [frame.frame.f_locals for frame in error.traceback]
    assert len(placed) > 5
    assert not any(
        isinstance(x, jax.Array) for local in frames for x in jax.tree.leaves(dict(local.get("params") or {}))
    )


def load_cached(model, directory, **kwargs):
    return sana_jax.load_transformer(model, cache_dir=directory, **kwargs)[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_converted_weights_are_read_in_place_of_the_source(dtype, model, tmp_path, monkeypatch):
    expected = sana_jax.load_transformer(model, dtype)[1]
    assert_same(load_cached(model, tmp_path / "cache", dtype=dtype), expected)
    (file,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(cache.atomic, "write_file", None)  # not written again
    assert_same(load_cached(model, tmp_path / "cache", dtype=dtype), expected)
    flat = safetensors.numpy.load_file(file)
    assert flat["blocks/self_attention/qkv/kernel"].shape == (2, 64, 3, 64)


def test_another_source_or_dtype_or_table_is_converted_anew(model, tmp_path, monkeypatch):
    directory = tmp_path / "cache"
    load_cached(model, directory)
    load_cached(model, directory, dtype="bfloat16")
    module, params = tiny_parts().transformer
    doubled = jax.tree.map(lambda x: 2 * x, params)
    sana_jax.save_transformer(module, doubled, model)
    os.utime(model / FILE, ns=(0, 0))  # however coarse the file system's clock is
    assert_same(load_cached(model, directory), doubled)
    assert len(list(directory.iterdir())) == 3
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    load_cached(model, directory)
    assert len(list(directory.iterdir())) == 4


def test_another_model_of_one_size_and_time_is_converted_anew(model, tmp_path):
    module, params = tiny_parts().transformer
    load_cached(model, tmp_path / "cache")
    facts = (model / FILE).stat()
    doubled = jax.tree.map(lambda x: 2 * x, params)
    sana_jax.save_transformer(module, doubled, model)
    os.utime(model / FILE, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (model / FILE).stat().st_size == facts.st_size and (model / FILE).stat().st_mtime_ns == facts.st_mtime_ns
    assert_same(load_cached(model, tmp_path / "cache"), doubled)


def test_damaged_converted_weights_are_written_again(model, tmp_path):
    load_cached(model, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    assert_same(load_cached(model, tmp_path / "cache"), tiny_parts().transformer[1])
    assert_same(safetensors.numpy.load_file(file)["proj_out/bias"], tiny_parts().transformer[1]["proj_out"]["bias"])


def test_an_interrupted_conversion_leaves_no_file(model, tmp_path, monkeypatch):
    def crash(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        load_cached(model, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


SHARDED = """
import json, sys, pathlib
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import sana_jax
from sana_jax.parallel import sharding
from sana_jax.weights.stored import StoredTensor

mesh = jax.make_mesh((2, 4, 1), ("data", "fsdp", "seq"))
whole = sana_jax.load_transformer(sys.argv[1])[1]

def by_rule(path, shape):
    keys = [jax.tree_util.DictKey(name) for name in ("transformer", *path.split("/"))]
    sharding.MIN_SHARDED = 0
    return NamedSharding(mesh, sharding.array_spec(keys, shape, dict(mesh.shape)))

def by_layer(path, shape):
    return NamedSharding(mesh, P("data") if path.startswith("blocks") else P())

out = {"devices": len(jax.devices())}
for name, places in (("fsdp", by_rule), ("layer", by_layer)):
    split = sana_jax.load_transformer(sys.argv[1], shardings=places)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), split, whole)
    out[name] = sum(x.sharding.shard_shape(x.shape) != x.shape for x in jax.tree.leaves(split))

# As one of two processes would read, whose devices hold the second layer only.
class Half:
    def addressable_devices_indices_map(self, shape):
        return {0: (slice(shape[0] // 2, shape[0]),) + (slice(None),) * (len(shape) - 1)}

import sana_jax.weights.placement as placement
count, plain = [0], StoredTensor.__getitem__
def counting(self, rows):
    array = plain(self, rows)
    count[0] += array.nbytes
    return array
StoredTensor.__getitem__ = counting
parts = {}
jax.make_array_from_callback = lambda shape, sharding, local, dtype: jax.device_put(
    local(sharding.addressable_devices_indices_map(shape)[0]))
half = sana_jax.load_transformer(sys.argv[1], shardings=lambda path, shape: Half())[1]
jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[len(b) // 2:]), half, whole)
out["read"] = count[0] / sum(x.nbytes for x in jax.tree.leaves(whole))
print(json.dumps(out))
"""


def test_parameters_are_read_straight_into_eight_devices_each_its_part(model):
    out = run_script(SHARDED, model, devices=8)
    assert out["devices"] == 8 and out["fsdp"] >= 12 and out["layer"] >= 10
    # Half of the bytes, but for the 6 D of scale_shift_table and the like whose halves are rows of the file too, and for
    # kernels [in, out] whose file has [out, in]: of those whole rows are read and cut (patch_embed, caption, ...).
    assert 0.5 <= out["read"] < 0.75


MEMORY = """
import json, sys
import jax
import sana_jax
from sana_jax.weights.parts import TRANSFORMER, abstract_params, find
from sana_jax.weights.placement import default_device

sana_jax.load_transformer(sys.argv[1], shardings=default_device)  # imports, compilation
abstract_params(find(TRANSFORMER, sys.argv[2]).module)

def resident(which):
    # Unlike getrusage, which also knows of the memory of the process that started this one.
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(which))

before = resident("VmRSS")
params = sana_jax.load_transformer(sys.argv[2], shardings=default_device)[1]
peak = resident("VmHWM")
sizes = [x.nbytes for x in jax.tree.leaves(params)]
print(json.dumps({"besides": peak - before - sum(sizes), "stacked": max(sizes), "parameters": sum(sizes)}))
"""


@pytest.mark.slow
def test_peak_memory_is_below_the_largest_file_and_one_stacked_parameter(model, tmp_path):
    """310 MB in shards of 50 MB; on the CPU the parameters themselves are resident as well and are taken off."""
    module = SanaTransformer(TransformerConfig(width=640, num_layers=12, caption_channels=64))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), parts.abstract_params(module))
    sana_jax.save_transformer(module, params, tmp_path / "large", max_shard_bytes=50_000_000)
    files = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    assert sum(files) > 290e6 and len(files) >= 6
    out = run_script(MEMORY, model, tmp_path / "large", devices=1)
    assert out["parameters"] > 290e6
    assert out["besides"] < 1.3 * max(files) + out["stacked"], out
