"""`.pth` files of the original code: the configuration from shapes, and what is wrong with a file."""

import dataclasses
import math
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_torch_pickle import tensor, write_legacy, write_zip
from tiny_pipeline import random_params

import sana_jax
from sana_jax.models import presets
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.weights import layout, native, parts, torch_pickle
from sana_jax.weights.stored import StoredTensor

TINY = TransformerConfig(
    sample_size=32, in_channels=6, out_channels=6, width=64, num_layers=2, num_cross_attention_heads=4,
    caption_channels=24, **native.SWITCHES,
)  # fmt: skip
HEADS = dict(num_cross_attention_heads=4)


def state_dict(config, seed=0):
    params = random_params(SanaTransformer(config), seed)
    return params, jax.tree.map(np.ascontiguousarray, layout.write(native.entries(config), params))


def write(path, tensors, wrap=lambda state: state, extra=(), legacy=False):
    """A file as torch.save writes it, by hand."""
    tensors = {**tensors, **dict(extra)}
    storages = {np.dtype("float32"): "FloatStorage", np.dtype("float16"): "HalfStorage"}
    state, buffers, counts = {}, {}, {}
    for i, (name, x) in enumerate(tensors.items()):
        strides = tuple(math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim))
        state[name] = tensor(str(i), storages[x.dtype], x.size, 0, x.shape, strides)
        buffers[str(i)], counts[str(i)] = np.ascontiguousarray(x).tobytes(), x.size
    if legacy:
        write_legacy(path, wrap(state), buffers, counts)
    else:
        write_zip(path, wrap(state), buffers)
    return path


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_teacher_of_sprint_has_its_timesteps(tmp_path):
    file = write(tmp_path / "Sana_Sprint_1.6B_1024px_teacher.pth", state_dict(TINY)[1])
    config = sana_jax.load_transformer(file, **HEADS)[0].config
    assert (config.timestep_scale, config.integer_timesteps) == (0.001, False)
    assert sana_jax.load_transformer(file, timestep_scale=1.0, **HEADS)[0].config.integer_timesteps


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_state_dict_is_read_with_its_configuration(legacy, tmp_path):
    params, tensors = state_dict(TINY)
    module, loaded = sana_jax.load_transformer(write(tmp_path / "x.pth", tensors, legacy=legacy), **HEADS)
    assert module.config == TINY
    assert_same(loaded, params)


@pytest.mark.parametrize(
    "changes",
    [
        dict(qk_norm=True),
        dict(qk_norm=True, guidance_embeds=True, timestep_scale=0.001, integer_timesteps=False),
        dict(patch_size=2),
        dict(mlp_ratio=math.nextafter(100 / 64, 2)),
        dict(num_layers=11),
    ],
)
def test_variants_are_known_by_their_tensors(changes, tmp_path):
    config = dataclasses.replace(TINY, **changes)
    params, tensors = state_dict(config)
    module, loaded = sana_jax.load_transformer(write(tmp_path / "x.pth", tensors), **HEADS)
    assert dataclasses.replace(module.config, mlp_ratio=config.mlp_ratio) == config
    assert int(module.config.mlp_ratio * 64) == int(config.mlp_ratio * 64)
    assert_same(loaded, params)


def test_the_feed_forward_width_comes_back_where_its_ratio_rounds_down():
    assert int(15 / 11 * 11) == 14
    heads = dict(attention_head_dim=1, num_cross_attention_heads=1)
    _, tensors = state_dict(dataclasses.replace(TINY, width=11, mlp_ratio=math.nextafter(15 / 11, 2), **heads))
    assert int(native.config_from_tensors(tensors, **heads).mlp_ratio * 11) == 15


PUBLIC = {
    "600m": (presets.sana_600m(), {}),
    "1600m_512": (presets.sana_1600m(16), dict(sample_size=16)),
    "1600m_2k": (presets.sana_1600m(64), dict(pos_embed=64)),
    "1600m_4k": (presets.sana_1600m(128), dict(sample_size=128)),
    "sana15_4800m": (presets.sana15_4800m(), {}),
    "sprint_600m": (presets.sprint_600m(), {}),
    "sprint_teacher": (
        presets.sana15_1600m(timestep_scale=0.001, integer_timesteps=False),
        dict(timestep_scale=0.001),
    ),
}


@pytest.mark.parametrize("config,given", PUBLIC.values(), ids=PUBLIC)
def test_every_public_size_is_inferred_from_shapes(config, given):
    abstract = parts.abstract_params(SanaTransformer(config))
    flat = {"/".join(key.key for key in path): x for path, x in jax.tree_util.tree_leaves_with_path(abstract)}
    shapes = {}
    for entry in native.entries(config):
        shapes |= entry.public_shapes(flat[entry.path].shape)
    tensors = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    assert tensors["blocks.0.attn.qkv.weight"].shape == (3 * config.width, config.width)
    given = dict(given)
    if side := given.pop("pos_embed", None):
        tensors["pos_embed"] = jax.ShapeDtypeStruct((1, side**2, config.width), jnp.float32)
    assert native.config_from_tensors(tensors, **given) == dataclasses.replace(config, **native.SWITCHES)


def write_checkpoint(path, legacy=False):
    """A training checkpoint with plain and averaged weights; gives the file and both as parameters."""
    trees, tensors = zip(*(state_dict(TINY, seed) for seed in range(2)), strict=True)
    both = {f"{i}.{name}": x for i, state in enumerate(tensors) for name, x in state.items()}

    def wrap(state):
        parted = [{name[2:]: x for name, x in state.items() if name.startswith(f"{i}.")} for i in range(2)]
        return {"state_dict": parted[0], "state_dict_ema": parted[1], "epoch": 3, "step": 70}

    return write(path, both, wrap, legacy=legacy), trees


@pytest.mark.parametrize("ema,expected", [(False, 0), (True, 1)])
def test_plain_and_averaged_weights_of_a_training_checkpoint(ema, expected, tmp_path):
    file, trees = write_checkpoint(tmp_path / "x.pth")
    assert_same(sana_jax.load_transformer(file, ema=ema, **HEADS)[1], trees[expected])


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_and_averaged_weights_of_one_file_are_converted_apart(legacy, tmp_path):
    file, trees = write_checkpoint(tmp_path / "x.pth", legacy)
    for ema in (False, True, False):
        found = sana_jax.load_transformer(file, ema=ema, cache_dir=tmp_path / "cache", **HEADS)[1]
        assert_same(found, trees[ema])
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_only_averaged_weights_are_read_where_there_are_no_others(tmp_path):
    params, tensors = state_dict(TINY)
    file = write(tmp_path / "x.pth", tensors, lambda state: {"state_dict_ema": state})
    assert_same(sana_jax.load_transformer(file, **HEADS)[1], params)
    file = write(tmp_path / "y.pth", tensors, lambda state: {"state_dict": state})
    with pytest.raises(ValueError, match="y.pth has no 'state_dict_ema', it has state_dict. Use ema=False"):
        sana_jax.load_transformer(file, ema=True, **HEADS)


def test_known_tensors_without_use_are_left_out_and_others_named(tmp_path):
    params, tensors = state_dict(TINY)
    known = {
        "y_embedder.y_embedding": np.ones((300, 24), np.float32),
        "pos_embed": np.ones((1, 1024, 64), np.float32),
        "logvar_linear.weight": np.ones((1, 64), np.float32),
        "logvar_linear.bias": np.ones(1, np.float32),
    }
    assert known.keys() == native.IGNORED.keys()
    assert_same(sana_jax.load_transformer(write(tmp_path / "x.pth", tensors, extra=known), **HEADS)[1], params)
    unknown = {"blocks.0.attn.qkv.bias": np.ones(192, np.float32)}
    with pytest.raises(ValueError, match="surplus blocks.0.attn.qkv.bias"):
        sana_jax.load_transformer(write(tmp_path / "x.pth", tensors, extra=unknown), **HEADS)


def test_sample_size_and_scale_follow_the_position_buffer_and_the_arguments(tmp_path):
    _, tensors = state_dict(TINY)
    file = write(tmp_path / "x.pth", tensors, extra={"pos_embed": np.zeros((1, 64**2, 64), np.float32)})
    config = sana_jax.load_transformer(file, **HEADS)[0].config
    assert (config.sample_size, config.interpolation_scale) == (64, 1.0)
    config = sana_jax.load_transformer(file, sample_size=128, clamp_fp16=True, **HEADS)[0].config
    assert (config.sample_size, config.interpolation_scale, config.clamp_fp16) == (128, 2.0, True)
    config = sana_jax.load_transformer(file, interpolation_scale=None, **HEADS)[0].config
    assert (config.sample_size, config.interpolation_scale) == (64, None)


def test_what_a_file_cannot_tell_is_asked_for(tmp_path):
    _, tensors = state_dict(TINY)
    file = write(tmp_path / "x.pth", tensors)
    with pytest.raises(ValueError, match="x.pth: width 64 is none of 1152, 2240.*give num_cross_attention_heads"):
        sana_jax.load_transformer(file)
    with pytest.raises(ValueError, match="sample_sise: no field of TransformerConfig"):
        sana_jax.load_transformer(file, sample_sise=16, **HEADS)
    sana_jax.save_transformer(SanaTransformer(TINY), state_dict(TINY)[0], tmp_path / "folder")
    with pytest.raises(
        ValueError, match="sample_size=16: only for a file of the original code; of .*folder the config"
    ):
        sana_jax.load_transformer(tmp_path / "folder", sample_size=16)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        sana_jax.load_transformer(tmp_path / "nowhere.pth")
    other = {"encoder.conv_in.weight": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match="missing x_embedder.proj.weight, .* is this another part?"):
        sana_jax.load_transformer(write(tmp_path / "x.pth", other))
    with pytest.raises(ValueError, match="'step' is no tensor"):
        sana_jax.load_transformer(write(tmp_path / "x.pth", other, lambda state: {**state, "step": 3}))


def test_a_file_cut_short_is_named(tmp_path):
    _, tensors = state_dict(TINY)
    file = write(tmp_path / "x.pth", tensors)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="x.pth is a zip file cut short"):
        sana_jax.load_transformer(file, **HEADS)


def test_tensors_of_a_zip_file_stay_on_disk_until_they_are_used(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    file = write(tmp_path / "x.pth", {"a": x, "b": x.astype(np.float16)})
    eager, lazy = torch_pickle.load(file), torch_pickle.load(file, lazy=True)
    assert all(isinstance(value, StoredTensor) for value in lazy.values())
    for name in "ab":
        np.testing.assert_array_equal(lazy[name][...], eager[name])
        np.testing.assert_array_equal(lazy[name][1:3], eager[name][1:3])


def test_strided_and_compressed_tensors_are_read_at_once(tmp_path):
    x = np.arange(12, dtype=np.float32)
    write_zip(tmp_path / "t.pth", tensor("0", "FloatStorage", 12, 0, (3, 4), (1, 3)), {"0": x.tobytes()})
    np.testing.assert_array_equal(torch_pickle.load(tmp_path / "t.pth", lazy=True), x.reshape(4, 3).T)
    with (
        zipfile.ZipFile(tmp_path / "t.pth") as plain,
        zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for name in plain.namelist():
            out.writestr(name, plain.read(name))
    np.testing.assert_array_equal(torch_pickle.load(tmp_path / "c.pth", lazy=True), x.reshape(4, 3).T)


def test_a_native_file_may_be_kept_converted(tmp_path):
    params, tensors = state_dict(TINY)
    for legacy in (False, True):
        file = write(tmp_path / f"{legacy}.pth", tensors, legacy=legacy)
        for _ in range(2):
            assert_same(sana_jax.load_transformer(file, cache_dir=tmp_path / "cache", **HEADS)[1], params)
    assert len(list((tmp_path / "cache").iterdir())) == 2
