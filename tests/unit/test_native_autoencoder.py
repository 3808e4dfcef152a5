"""Autoencoder files of the original code: the configuration from names and shapes, and where a file may lie."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl import logging
from test_native import TINY as TRANSFORMER
from test_native import state_dict as transformer_state_dict
from test_native import write
from tiny_pipeline import random_params

import sana_jax
from sana_jax.models import presets
from sana_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sana_jax.weights import layout, native_autoencoder, parts
from sana_jax.weights.__main__ import main

TINY = AutoencoderConfig(
    latent_channels=4,
    attention_head_dim=8,
    encoder_block_types=("ResBlock", "EfficientViTBlock"),
    decoder_block_types=("ResBlock", "EfficientViTBlock"),
    encoder_block_out_channels=(8, 16),
    decoder_block_out_channels=(8, 16),
    encoder_layers_per_block=(2, 1),
    decoder_layers_per_block=(1, 2),
    encoder_qkv_multiscales=((), (5,)),
    decoder_qkv_multiscales=((), (5,)),
    upsample_block_type="interpolate",
    downsample_block_type="conv",
    scaling_factor=0.41407,
)


def state_dict(config, seed=0):
    params = random_params(Autoencoder(config), seed)
    return params, jax.tree.map(np.ascontiguousarray, layout.write(native_autoencoder.entries(config), params))


def shapes(config):
    """Name -> shape of the public tensors, nothing allocated."""
    abstract = parts.abstract_params(Autoencoder(config))
    flat = {"/".join(key.key for key in path): x for path, x in jax.tree_util.tree_leaves_with_path(abstract)}
    found = {}
    for entry in native_autoencoder.entries(config):
        found |= entry.public_shapes(flat[entry.path].shape)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in found.items()}


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(
    "config",
    [
        presets.dc_ae_f32c32_sana_1_1(),
        presets.dc_ae_lite_f32c32_sana_1_1(),
        presets.dc_ae_f32c32_in_1_0(scaling_factor=1.0),
        presets.dc_ae_f64c128_in_1_0(scaling_factor=1.0),
        presets.dc_ae_f128c512_in_1_0(),
    ],
    ids=["sana", "lite", "f32", "f64", "f128"],
)
def test_every_public_family_is_inferred_from_names_and_shapes(config):
    assert native_autoencoder.config_from_tensors(shapes(config)) == config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(encoder_layers_per_block=(0, 1), decoder_layers_per_block=(0, 1)),
        dict(encoder_layers_per_block=(0, 1), decoder_layers_per_block=(0, 1), upsample_block_type="pixel_shuffle"),
        dict(downsample_block_type="pixel_unshuffle", upsample_block_type="pixel_shuffle"),
        dict(encoder_layers_per_block=(1, 0), decoder_layers_per_block=(1, 0), encoder_block_out_channels=(16, 32)),
        dict(encoder_out_shortcut=False, decoder_in_shortcut=False),
        dict(decoder_qkv_multiscales=((), (3, 7))),
        dict(latent_channels=8, decoder_block_out_channels=(16, 32)),
    ],
)
def test_variants_are_known_by_their_tensors(changes):
    config = dataclasses.replace(TINY, **changes)
    given = dict(attention_head_dim=8, scaling_factor=0.41407, decoder_conv_act_fn="relu")  # where no scale tells
    inferred = native_autoencoder.config_from_tensors(shapes(config), **given)
    if all(config.encoder_layers_per_block):
        assert inferred == config
    else:  # block kinds of an empty stage are not told
        assert inferred.upsample_block_type == config.upsample_block_type
        assert inferred.downsample_block_type == config.downsample_block_type
        assert parts.abstract_params(Autoencoder(inferred)) == parts.abstract_params(Autoencoder(config))


def test_a_file_is_read_from_wherever_it_lies(tmp_path):
    params, tensors = state_dict(TINY)
    hub = tmp_path / "dc-ae"
    for folder in (hub, tmp_path / "bare"):
        folder.mkdir()
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (hub / "config.json").write_text(json.dumps({"model_name": "dc-ae-f32c32-sana-1.0"}))
    counter = {"decoder.stages.0.op_list.1.main.conv2.norm.num_batches_tracked": np.ones((), np.float32)}
    places = [
        hub,
        tmp_path / "bare",
        hub / "model.safetensors",
        write(tmp_path / "x.pt", tensors),
        write(tmp_path / "x.pth", tensors, lambda state: {"state_dict": state, "step": 3}),
        write(tmp_path / "y.pth", tensors, lambda state: {"model": state}, extra=counter, legacy=True),
    ]
    for place in places:
        module, loaded = sana_jax.load_autoencoder(place)
        assert module.config == TINY, place
        assert_same(loaded, params)


def test_what_a_file_cannot_tell_may_be_given_and_is_warned_of(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *arguments: warnings.append(message))
    plain = dataclasses.replace(TINY, encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()))
    file = write(tmp_path / "x.pth", state_dict(plain)[1])
    fields = dict(attention_head_dim=8, scaling_factor=0.3189, decoder_act_fns="relu")
    module, _ = sana_jax.load_autoencoder(file, **fields)
    assert module.config == dataclasses.replace(plain, **fields) and not warnings
    assert sana_jax.load_autoencoder(file, attention_head_dim=8)[0].config.scaling_factor == 1.0
    assert "does not tell the scaling factor" in warnings[0]
    with pytest.raises(ValueError, match="scaling_faktor: no field of AutoencoderConfig"):
        sana_jax.load_autoencoder(file, scaling_faktor=0.3189)
    sana_jax.save_autoencoder(Autoencoder(TINY), state_dict(TINY)[0], tmp_path / "folder")
    with pytest.raises(ValueError, match="scaling_factor=1: only for a file of the original code"):
        sana_jax.load_autoencoder(tmp_path / "folder", scaling_factor=1)


def test_the_scale_of_latents_is_known_by_the_models_name(tmp_path):
    plain = dataclasses.replace(TINY, encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()))
    tensors = state_dict(plain)[1]
    named, cached = tmp_path / "mine", tmp_path / "models--mit-han-lab--dc-ae-f64c128-in-1.0" / "snapshots" / "0a1b"
    for folder in (named, cached):
        folder.mkdir(parents=True)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (named / "config.json").write_text(json.dumps({"model_name": "dc-ae-f32c32-mix-1.0"}))
    file = write(tmp_path / "dc-ae-f32c32-in-1.0.pt", tensors)
    for place, factor in ((named, 0.4552), (cached, 0.2889), (file, 0.3189)):
        assert sana_jax.load_autoencoder(place, attention_head_dim=8)[0].config.scaling_factor == factor
    assert sana_jax.load_autoencoder(file, attention_head_dim=8, scaling_factor=0.5)[0].config.scaling_factor == 0.5


def test_other_files_and_damaged_ones_are_refused(tmp_path):
    tensors = state_dict(TINY)[1]
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        sana_jax.load_autoencoder(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="missing encoder.project_in.conv.weight, .* is this another part"):
        sana_jax.load_autoencoder(write(tmp_path / "x.pth", transformer_state_dict(TRANSFORMER)[1]))
    no_decoder = {name: x for name, x in tensors.items() if not name.startswith("decoder.stages.")}
    with pytest.raises(ValueError, match=r"x.pth: missing all of decoder.stages"):
        sana_jax.load_autoencoder(write(tmp_path / "x.pth", no_decoder))
    lacking = "encoder.stages.1.op_list.0.local_module.main.depth_conv.conv.bias"
    with pytest.raises(ValueError, match=f"missing {lacking}"):
        sana_jax.load_autoencoder(write(tmp_path / "x.pth", {k: x for k, x in tensors.items() if k != lacking}))


def test_inspection_knows_an_autoencoder_by_its_names(tmp_path, capsys):
    safetensors.numpy.save_file(state_dict(TINY)[1], tmp_path / "model.safetensors")
    for place in (tmp_path, tmp_path / "model.safetensors", write(tmp_path / "x.pth", state_dict(TINY)[1])):
        assert main(["inspect", str(place)]) == 0
        out = capsys.readouterr().out
        assert "autoencoder in the original code's layout" in out
        assert "f2c4, scaling factor 0.41407, down by conv, up by interpolate" in out
