"""Autoencoder files of the original code against diffusers: one model's weights in both layouts, renamed here."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers
from diffusers.models.autoencoders import autoencoder_dc
from test_autoencoder_parity import VARIANTS, errors, make_pair, our_params

import sana_jax

pytestmark = pytest.mark.parity

# With batch norm in an EfficientViT block the original code has it in the feed-forward part too, and diffusers has not.
ORIGINAL = [name for name in VARIANTS if name != "two_scales_and_batch_norm_attention"]
# What the files do not tell: a head's 8 channels where there is one scale only, and what differs from the public models.
GIVEN = dict(attention_head_dim=8, scaling_factor=1.0)
NOT_AS_PUBLIC = {"empty_last_stage": dict(decoder_conv_act_fn="relu")}


def native_state_dict(theirs):
    """What the original code would have saved: by the kind of every module, as its dc_ae.py builds them."""
    native = {}
    down = "conv" if theirs.config.downsample_block_type == "conv" else "conv.conv"

    def put(name, module):
        for kind, value in module.state_dict().items():
            pointwise = isinstance(module, torch.nn.Linear)
            native[f"{name}.{kind}"] = value[:, :, None, None] if pointwise else value

    def put_block(name, block):
        match type(block):
            case autoencoder_dc.ResBlock:
                put(f"{name}.main.conv1.conv", block.conv1)
                put(f"{name}.main.conv2.conv", block.conv2)
                put(f"{name}.main.conv2.norm", block.norm)
            case autoencoder_dc.DCDownBlock2d:
                put(f"{name}.main.{down}", block.conv)
            case autoencoder_dc.DCUpBlock2d:
                put(f"{name}.main.conv.conv", block.conv)
            case autoencoder_dc.EfficientViTBlock:
                attention, local = block.attn, block.conv_out
                qkv = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
                native[f"{name}.context_module.main.qkv.conv.weight"] = qkv.detach()[:, :, None, None]
                for i, scale in enumerate(attention.to_qkv_multiscale):
                    put(f"{name}.context_module.main.aggreg.{i}.0", scale.proj_in)
                    put(f"{name}.context_module.main.aggreg.{i}.1", scale.proj_out)
                put(f"{name}.context_module.main.proj.conv", attention.to_out)
                put(f"{name}.context_module.main.proj.norm", attention.norm_out)
                put(f"{name}.local_module.main.inverted_conv.conv", local.conv_inverted)
                put(f"{name}.local_module.main.depth_conv.conv", local.conv_depth)
                put(f"{name}.local_module.main.point_conv.conv", local.conv_point)
                put(f"{name}.local_module.main.point_conv.norm", local.norm)
            case other:
                raise AssertionError(other)

    for side, stages in (("encoder", theirs.encoder.down_blocks), ("decoder", theirs.decoder.up_blocks)):
        for s, stage in enumerate(stages):
            for i, block in enumerate(stage):
                put_block(f"{side}.stages.{s}.op_list.{i}", block)
    first, last = theirs.encoder.conv_in, theirs.decoder.conv_out
    if isinstance(first, autoencoder_dc.DCDownBlock2d):
        put(f"encoder.project_in.{down}", first.conv)
    else:
        put("encoder.project_in.conv", first)
    put(f"encoder.project_out{'.main' * theirs.config.encoder_out_shortcut}.op_list.0.conv", theirs.encoder.conv_out)
    put(f"decoder.project_in{'.main' * theirs.config.decoder_in_shortcut}.conv", theirs.decoder.conv_in)
    put("decoder.project_out.op_list.0", theirs.decoder.norm_out)
    if isinstance(last, autoencoder_dc.DCUpBlock2d):
        put("decoder.project_out.op_list.2.conv.conv", last.conv)
    else:
        put("decoder.project_out.op_list.2.conv", last)
    return native


@pytest.mark.parametrize("variant", ["sana", "in_and_mix"])
def test_diffusers_own_converter_takes_the_names_of_this_test(variant):
    theirs = make_pair(variant)[0]
    converted = convert_autoencoder_dc_checkpoint_to_diffusers(native_state_dict(theirs))
    expected = theirs.state_dict()
    assert converted.keys() == expected.keys()
    for name, value in converted.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("variant", ORIGINAL)
def test_a_native_file_gives_the_parameters_and_the_output_of_diffusers(variant, tmp_path, measured):
    theirs, tensors, reference = make_pair(variant)
    torch.save({"state_dict": native_state_dict(theirs), "epoch": 3}, tmp_path / "x.pth")
    module, params = sana_jax.load_autoencoder(tmp_path / "x.pth", **GIVEN | NOT_AS_PUBLIC.get(variant, {}))
    jax.tree.map(np.testing.assert_array_equal, params, our_params(reference, tensors))
    assert told(module.config) == told(reference.config)
    error = max(errors(variant, 32, 48, params))
    measured("DC-AE, files of the original code", "encode and decode, tiny model", error, 1e-4)


def told(config):
    """The configuration without what nothing follows from: the kind and width of a stage that has no blocks."""
    values = dataclasses.asdict(config)
    for side in ("encoder", "decoder"):
        layers = values[f"{side}_layers_per_block"]
        for field in ("block_types", "block_out_channels", "qkv_multiscales"):
            values[f"{side}_{field}"] = [x for x, n in zip(values[f"{side}_{field}"], layers, strict=True) if n]
    return values


def test_reading_the_fused_q_k_and_v_in_another_order_breaks_parity(tmp_path):
    native = native_state_dict(make_pair("sana")[0])
    name = "decoder.stages.2.op_list.0.context_module.main.qkv.conv.weight"
    q, k, v = native[name].chunk(3)
    torch.save({**native, name: torch.cat([q, v, k])}, tmp_path / "x.pth")
    params = sana_jax.load_autoencoder(tmp_path / "x.pth", **GIVEN)[1]
    encode, decode = errors("sana", 32, 48, params)
    assert encode < 1e-4 and decode > 1e-2
