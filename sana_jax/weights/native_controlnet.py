"""A ControlNet in the layout of the original code's files, which hold its base too: key table, and configuration from shapes."""

import dataclasses
import re
from collections.abc import Mapping

from sana_jax.models.controlnet import ControlNetConfig
from sana_jax.weights import native
from sana_jax.weights.controlnet import OF_THE_BASE_ALONE
from sana_jax.weights.layout import Entry
from sana_jax.weights.transformer import dense_entries

IGNORED = native.IGNORED
_COPY = "controlnet.{layer}"


def entries(config: ControlNetConfig) -> list[Entry]:
    """The key table; the embeddings are the base's."""

    def copied(entry):
        return tuple(name.replace("blocks.{layer}", f"{_COPY}.copied_block") for name in entry.names)

    table = [entry for entry in native.entries(config) if entry.path not in OF_THE_BASE_ALONE]
    return [
        *(dataclasses.replace(entry, names=copied(entry)) for entry in table),
        *dense_entries("hint", "controlnet.0.before_proj"),
        *dense_entries("blocks/residual", f"{_COPY}.after_proj", layers=config.num_layers),
    ]


def config_from_tensors(tensors: Mapping, **fields) -> ControlNetConfig:
    """As `native.config_from_tensors` of the base, with as many blocks as are copied, and the wiring "original".

    Raises:
      ValueError: the file has no ControlNet, or as there.
    """
    copies = {int(match[1]) for name in tensors if (match := re.match(r"controlnet\.(\d+)\.", name))}
    if not copies:
        raise ValueError("no tensor is named controlnet.0.*: the file has no ControlNet.")
    fields = {"num_layers": len(copies), "wiring": "original"} | fields
    wiring = fields.pop("wiring")
    return ControlNetConfig(**dataclasses.asdict(native.config_from_tensors(tensors, **fields)), wiring=wiring)


def is_of_base(name: str) -> bool:
    """Whether a tensor is of the base alone: of its blocks or its last layer."""
    return name.startswith(("blocks.", "final_layer."))


def is_of_controlnet(name: str) -> bool:
    """Whether a tensor is of the ControlNet alone."""
    return name.startswith("controlnet.")
