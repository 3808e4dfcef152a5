"""DC-AE in the diffusers layout (`AutoencoderDC`): key table and config.json."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from sana_jax.models.autoencoder import AutoencoderConfig
from sana_jax.weights import setting_rules
from sana_jax.weights.layout import CONV, DEPTHWISE, LINEAR, POINTWISE, SAME, Entry, Form, grouped_pointwise

CLASS_NAME = "AutoencoderDC"

# Fields of ours that say how to compute, not what: they have no place in a model's file.
OWN_FIELDS = ("dtype", "remat")
KEYS = [field.name for field in dataclasses.fields(AutoencoderConfig) if field.name not in OWN_FIELDS]
RULES = setting_rules.of_fields(AutoencoderConfig, {key: key for key in KEYS})


def entries(config: AutoencoderConfig) -> list[Entry]:
    """The key table of a model of this configuration."""
    return [*_encoder_entries(config), *_decoder_entries(config)]


def batch_counts(config: AutoencoderConfig) -> dict[str, np.ndarray]:
    """The counters beside the statistics of batch norms: in every public file, used by no inference, kept by no model here.

    PyTorch counts training steps there; 0 says that there were none.
    """
    means = [name for entry in entries(config) for name in entry.public_names() if name.endswith(".running_mean")]
    return {name.removesuffix("running_mean") + "num_batches_tracked": np.zeros((), np.int64) for name in means}


def config_from_json(values: Mapping) -> AutoencoderConfig:
    """The configuration a public config.json describes.

    Raises:
      ValueError: a key is unknown, or a value describes no model of ours.
    """
    values = {key: _tuples(value) for key, value in values.items() if not key.startswith("_")}
    if unknown := sorted(values.keys() - set(KEYS)):
        raise ValueError(f"config.json of the autoencoder has unknown keys: {', '.join(map(repr, unknown))}.")
    # In diffusers every other name than pixel_unshuffle means the strided convolution; files write "Conv" or "conv".
    if values.get("downsample_block_type", "").lower() == "conv":
        values["downsample_block_type"] = "conv"
    return AutoencoderConfig(**values)


def config_to_json(config: AutoencoderConfig) -> dict:
    """The config.json that diffusers reads."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in OWN_FIELDS}
    return {"_class_name": CLASS_NAME, **values}


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _encoder_entries(config: AutoencoderConfig) -> list[Entry]:
    layers, last = config.encoder_layers_per_block, len(config.encoder_layers_per_block) - 1
    table = _sampling_conv("encoder/conv_in", "encoder.conv_in", resamples=not layers[0])
    for stage, count in enumerate(layers):
        here, there = f"encoder/stage_{stage}", f"encoder.down_blocks.{stage}"
        for i in range(count):
            table += _block(config, "encoder", stage, f"{here}_block_{i}", f"{there}.{i}")
        if count and stage < last:
            table += _conv(f"{here}_down/conv", f"{there}.{count}.conv")
    return table + _conv("encoder/conv_out", "encoder.conv_out")


def _decoder_entries(config: AutoencoderConfig) -> list[Entry]:
    layers, last = config.decoder_layers_per_block, len(config.decoder_layers_per_block) - 1
    table = _conv("decoder/conv_in", "decoder.conv_in")
    for stage, count in enumerate(layers):
        here, there = f"decoder/stage_{stage}", f"decoder.up_blocks.{stage}"
        up = int(count > 0 and stage < last)  # the Up block stands before the stage's own blocks
        if up:
            table += _conv(f"{here}_up/conv", f"{there}.0.conv")
        for i in range(count):
            table += _block(config, "decoder", stage, f"{here}_block_{i}", f"{there}.{i + up}")
    table += _norm("decoder/norm_out", "decoder.norm_out", "rms_norm")
    return table + _sampling_conv("decoder/conv_out", "decoder.conv_out", resamples=not layers[0])


def _block(config: AutoencoderConfig, side: str, stage: int, here: str, there: str) -> list[Entry]:
    norm = config.decoder_norm_types[stage] if side == "decoder" else "rms_norm"
    if getattr(config, f"{side}_block_types")[stage] == "ResBlock":
        return [
            *_conv(f"{here}/conv1", f"{there}.conv1"),
            Entry(f"{here}/conv2/kernel", (f"{there}.conv2.weight",), CONV),
            *_norm(f"{here}/norm", f"{there}.norm", norm),
        ]
    width = getattr(config, f"{side}_block_out_channels")[stage]
    scales = getattr(config, f"{side}_qkv_multiscales")[stage]
    groups = 3 * width // config.attention_head_dim
    mine, theirs = f"{here}/attention", f"{there}.attn"
    table = [
        Entry(f"{mine}/qkv/kernel", tuple(f"{theirs}.to_{part}.weight" for part in "qkv"), LINEAR),
        Entry(f"{mine}/out/kernel", (f"{theirs}.to_out.weight",), LINEAR),
        *_norm(f"{mine}/norm", f"{theirs}.norm_out", norm),
    ]
    for i in range(len(scales)):
        scale = f"{theirs}.to_qkv_multiscale.{i}"
        table += [
            Entry(f"{mine}/scale_{i}/depth", (f"{scale}.proj_in.weight",), DEPTHWISE),
            Entry(f"{mine}/scale_{i}/group", (f"{scale}.proj_out.weight",), grouped_pointwise(groups)),
        ]
    mine, theirs = f"{here}/feed_forward", f"{there}.conv_out"
    return table + [
        *_conv(f"{mine}/inverted", f"{theirs}.conv_inverted", POINTWISE),
        Entry(f"{mine}/depth_kernel", (f"{theirs}.conv_depth.weight",), DEPTHWISE),
        Entry(f"{mine}/depth_bias", (f"{theirs}.conv_depth.bias",), SAME),
        Entry(f"{mine}/point/kernel", (f"{theirs}.conv_point.weight",), POINTWISE),
        *_norm(f"{mine}/norm", f"{theirs}.norm", "rms_norm"),
    ]


def _conv(ours: str, theirs: str, form: Form = CONV) -> list[Entry]:
    return [Entry(f"{ours}/kernel", (f"{theirs}.weight",), form), Entry(f"{ours}/bias", (f"{theirs}.bias",), SAME)]


def _sampling_conv(ours: str, theirs: str, resamples: bool) -> list[Entry]:
    """The first or last layer: a convolution, or within a Down or Up block where stage 0 is empty."""
    return _conv(f"{ours}/conv", f"{theirs}.conv") if resamples else _conv(ours, theirs)


def _norm(ours: str, theirs: str, kind: str) -> list[Entry]:
    names = {"scale": "weight", "bias": "bias"}
    if kind == "batch_norm":
        names |= {"mean": "running_mean", "var": "running_var"}
    return [Entry(f"{ours}/{mine}", (f"{theirs}.{name}",), SAME) for mine, name in names.items()]
