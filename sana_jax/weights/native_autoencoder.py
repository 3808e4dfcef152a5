"""DC-AE in the layout of the original code (mit-han-lab/efficientvit): names, and configuration from names and shapes.

A file has the tensors of diffusers' layout under other names, the 1x1 convolutions of the attention with four axes, and its
q, k and v in one tensor. Stage 0 is the finest in both, and a stage's Down and Up blocks stand at the same places.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import NamedTuple

from absl import logging

from sana_jax.models.autoencoder import AutoencoderConfig
from sana_jax.weights import autoencoder
from sana_jax.weights.layout import LINEAR, POINTWISE, Entry
from sana_jax.weights.native_files import SCALING_FACTORS, check_fields, shape_of

IGNORED = {}  # known tensors that carry nothing for us: none beside batch norm's counters
SANA_SCALING_FACTOR = 0.41407
HEAD_DIM = 32

# What stands in a block, in diffusers and in the original code.
_RES_BLOCK = {"conv1": "main.conv1.conv", "conv2": "main.conv2.conv", "norm": "main.conv2.norm"}
_ATTENTION_BLOCK = {
    **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v"), "context_module.main.qkv.conv"),
    "attn.to_out": "context_module.main.proj.conv",
    "attn.norm_out": "context_module.main.proj.norm",
    "conv_out.conv_inverted": "local_module.main.inverted_conv.conv",
    "conv_out.conv_depth": "local_module.main.depth_conv.conv",
    "conv_out.conv_point": "local_module.main.point_conv.conv",
    "conv_out.norm": "local_module.main.point_conv.norm",
}
_SCALE = {"proj_in": 0, "proj_out": 1}
# By what begins there, what stands at a place of a stage. The kinds of Down and Up blocks are told apart by shapes.
_RESAMPLES = "main.conv."
_PLACE = re.compile(r"(encoder|decoder)\.stages\.(\d+)\.op_list\.(\d+)\.(context_module\.|main\.conv1\.|main\.conv\.)")


class _Stage(NamedTuple):
    """What the tensors say of one stage of one side."""

    layers: int
    width: int
    attention: bool
    scales: tuple[int, ...]
    batch_norm: bool


def entries(config: AutoencoderConfig) -> list[Entry]:
    """The key table of a model of this configuration."""
    table = []
    for entry in autoencoder.entries(config):
        names = dict.fromkeys(_native_name(config, name) for name in entry.names)  # q, k and v have one
        form = POINTWISE if entry.form is LINEAR else entry.form
        table.append(dataclasses.replace(entry, names=tuple(names), form=form))
    return table


def config_from_tensors(tensors: Mapping, **fields) -> AutoencoderConfig:
    """The configuration of a native state dict.

    From names and shapes: channels, depths, widths, block kinds, scales of the attention, norms of the decoder, kinds of
    Down and Up blocks, shortcuts next to the latent.
    By rule, unless `fields` says otherwise:
      attention_head_dim is 32 where no attention has a second scale, which tells it;
      decoder_act_fns is ReLU in the stages with batch norm, else SiLU;
      decoder_conv_act_fn is SiLU in a decoder without attention (DC-AE-Lite), else ReLU;
      scaling_factor is 0.41407 where the encoder's attention has a second scale (the sana family, Lite too), else 1.0 with
        a warning: of the in- and mix-1.0 families it belongs to the diffusion model, not to the autoencoder, and their
        tensors do not tell them apart (`load_autoencoder` does by their names, `native_files.SCALING_FACTORS`);
      a stage without blocks takes after its neighbour, at half the width where it is the finest.

    Raises:
      ValueError: a tensor that decides is missing, `fields` has no such field, or the two sides do not fit each other.
    """
    check_fields(AutoencoderConfig, fields)

    def shape(*names: str) -> tuple[int, ...]:
        """Of the first of the names that there is."""
        return shape_of(tensors, next((name for name in names if name in tensors), names[0]), 4, "an autoencoder")

    in_channels = shape("encoder.project_in.conv.weight", "encoder.project_in.conv.conv.weight")[1]
    latent = shape("decoder.project_in.main.conv.weight", "decoder.project_in.conv.weight")
    head = shape("encoder.project_out.main.op_list.0.conv.weight", "encoder.project_out.op_list.0.conv.weight")
    encoder, decoder = _stages(tensors, "encoder", head[1]), _stages(tensors, "decoder", latent[0])
    ups = {f"decoder.stages.{stage}.op_list.0.main.conv.conv.weight": x.width for stage, x in enumerate(decoder)}
    ups["decoder.project_out.op_list.2.conv.conv.weight"] = in_channels
    interpolate = any(name in tensors and shape(name)[0] == width for name, width in ups.items())
    unshuffle = any(
        re.match(r"encoder\.(project_in|stages\.\d+\.op_list\.\d+\.main)\.conv\.conv\.", x) for x in tensors
    )
    inferred = dict(
        in_channels=in_channels,
        latent_channels=latent[1],
        attention_head_dim=next((shape(name)[1] for name in tensors if ".aggreg.0.1." in name), HEAD_DIM),
        upsample_block_type="interpolate" if interpolate else "pixel_shuffle",
        downsample_block_type="pixel_unshuffle" if unshuffle else "conv",
        decoder_norm_types=tuple("batch_norm" if stage.batch_norm else "rms_norm" for stage in decoder),
        decoder_act_fns=tuple("relu" if stage.batch_norm else "silu" for stage in decoder),
        encoder_out_shortcut="encoder.project_out.main.op_list.0.conv.weight" in tensors,
        decoder_in_shortcut="decoder.project_in.main.conv.weight" in tensors,
        decoder_conv_act_fn="relu" if any(stage.attention for stage in decoder) else "silu",
        scaling_factor=SANA_SCALING_FACTOR if any(stage.scales for stage in encoder) else 1.0,
    )
    for side, stages in (("encoder", encoder), ("decoder", decoder)):
        inferred[f"{side}_block_types"] = tuple("EfficientViTBlock" if x.attention else "ResBlock" for x in stages)
        inferred[f"{side}_block_out_channels"] = tuple(x.width for x in stages)
        inferred[f"{side}_layers_per_block"] = tuple(x.layers for x in stages)
        inferred[f"{side}_qkv_multiscales"] = tuple(x.scales for x in stages)
    if "scaling_factor" not in fields and inferred["scaling_factor"] == 1.0:
        logging.warning(
            "The autoencoder's file does not tell the scaling factor of its latents; 1.0 is taken. For diffusion give "
            "scaling_factor=...: %s.",
            ", ".join(f"{value} for {name}" for name, value in SCALING_FACTORS.items()),
        )
    return AutoencoderConfig(**inferred | fields)


def _stages(tensors: Mapping, side: str, deepest: int) -> list[_Stage]:
    """All stages of a side, from the finest; `deepest` is the width of the coarsest."""
    found = collections.defaultdict(dict)  # stage -> place in it -> what begins there
    for name in tensors:
        if (match := _PLACE.match(name)) and match[1] == side:
            found[int(match[2])][int(match[3])] = match[4]
    last = max(found, default=0)
    count = last + 1 + (_RESAMPLES in found[last].values())  # a stage without blocks has no tensors, but a way to it
    stages = [_stage(tensors, f"{side}.stages.{stage}.op_list", found[stage]) for stage in range(count)]
    if not any(stages):
        raise ValueError(f"missing all of {side}.stages, which an autoencoder of the original code has.")
    for i, stage in enumerate(stages):
        if stage is None:
            neighbour = stages[i - 1] if i else next(filter(None, stages))
            stages[i] = neighbour._replace(layers=0, width=deepest if i else neighbour.width // 2)
    return stages


def _stage(tensors: Mapping, prefix: str, places: Mapping[int, str]) -> _Stage | None:
    """A stage by its first block; None where it has none."""
    blocks = sorted(place for place, kind in places.items() if kind != _RESAMPLES)
    if not blocks:
        return None
    block = f"{prefix}.{blocks[0]}"
    if places[blocks[0]] == "main.conv1.":
        width = shape_of(tensors, f"{block}.main.conv1.conv.weight", 4, "a ResBlock")[0]
        return _Stage(len(blocks), width, False, (), f"{block}.main.conv2.norm.running_mean" in tensors)
    attention = f"{block}.context_module.main"
    width = shape_of(tensors, f"{attention}.qkv.conv.weight", 4, "an EfficientViTBlock")[1]
    names = itertools.takewhile(tensors.__contains__, (f"{attention}.aggreg.{i}.0.weight" for i in itertools.count()))
    scales = tuple(tensors[name].shape[-1] for name in names)
    return _Stage(len(blocks), width, True, scales, f"{attention}.proj.norm.running_mean" in tensors)


def _native_name(config: AutoencoderConfig, name: str) -> str:
    """The original code's name of a tensor of diffusers' layout."""
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\d+)\.(.+)", module):
        side, stage, place, inner = match.groups()
        return f"{side}.stages.{stage}.op_list.{place}.{_within_block(config, side, inner)}.{kind}"
    down = "encoder.project_in." + _down(config)
    ends = {
        "encoder.conv_in": "encoder.project_in.conv",
        "encoder.conv_in.conv": down,
        "encoder.conv_out": f"encoder.project_out{'.main' * config.encoder_out_shortcut}.op_list.0.conv",
        "decoder.conv_in": f"decoder.project_in{'.main' * config.decoder_in_shortcut}.conv",
        "decoder.norm_out": "decoder.project_out.op_list.0",
        "decoder.conv_out": "decoder.project_out.op_list.2.conv",
        "decoder.conv_out.conv": "decoder.project_out.op_list.2.conv.conv",
    }
    return f"{ends[module]}.{kind}"


def _within_block(config: AutoencoderConfig, side: str, name: str) -> str:
    if name == "conv":
        return "main." + (_down(config) if side == "encoder" else "conv.conv")
    if match := re.fullmatch(r"attn\.to_qkv_multiscale\.(\d+)\.(proj_in|proj_out)", name):
        return f"context_module.main.aggreg.{match[1]}.{_SCALE[match[2]]}"
    return (_RES_BLOCK | _ATTENTION_BLOCK)[name]


def _down(config: AutoencoderConfig) -> str:
    """The convolution of a Down block, which is the whole block where it is strided."""
    return "conv" if config.downsample_block_type == "conv" else "conv.conv"
