"""A ControlNet in the diffusers layout (`SanaControlNetModel`): key table and config.json."""

import dataclasses
from collections.abc import Mapping

from sana_jax.models.controlnet import WIRINGS, ControlNetConfig
from sana_jax.models.transformer import TransformerConfig
from sana_jax.weights import setting_rules, transformer
from sana_jax.weights.layout import Entry
from sana_jax.weights.transformer import dense_entries

CLASS_NAME = "SanaControlNetModel"
RULES = transformer.RULES | {"wiring": setting_rules.one_of(*WIRINGS)}
_NOT_IN_DIFFUSERS = ("qk_norm", "guidance_embeds", "guidance_embeds_scale", "timestep_scale")
OF_THE_BASE_ALONE = ("scale_shift_table", "proj_out/kernel", "proj_out/bias")


def entries(config: ControlNetConfig) -> list[Entry]:
    """The key table of a ControlNet of this configuration."""
    return [
        *(entry for entry in transformer.entries(config) if entry.path not in OF_THE_BASE_ALONE),
        *dense_entries("hint", "input_block"),
        *dense_entries("blocks/residual", "controlnet_blocks.{layer}", layers=config.num_layers),
    ]


def config_from_json(values: Mapping) -> ControlNetConfig:
    """The configuration a public config.json describes; errors as of the transformer's."""
    values = {"num_layers": ControlNetConfig.num_layers, **values}
    wiring = values.pop("wiring", ControlNetConfig.wiring)
    return ControlNetConfig(**dataclasses.asdict(transformer.config_from_json(values, "ControlNet")), wiring=wiring)


def config_to_json(config: ControlNetConfig) -> dict:
    """The config.json that diffusers reads; options of ours are added only where they are not the default."""
    values, plain = transformer.config_to_json(config), transformer.config_to_json(TransformerConfig())
    values = {key: value for key, value in values.items() if key not in _NOT_IN_DIFFUSERS or value != plain[key]}
    own = {} if config.wiring == ControlNetConfig.wiring else {"wiring": config.wiring}
    return values | {"_class_name": CLASS_NAME} | own
