"""A ControlNet on disk, and whether it is of the model that it is to guide."""

import dataclasses
import os
import pathlib

from sana_jax.models.controlnet import WIRINGS, SanaControlNet
from sana_jax.models.transformer import TransformerConfig
from sana_jax.weights import native_files, parts
from sana_jax.weights.parts import CONTROLNET, Source

# What the tensors of a file of the original code do not tell, and its base does.
_UNTOLD = ("attention_head_dim", "num_cross_attention_heads", "sample_size")
_EQUAL = ("width", "in_channels", "patch_size", "caption_channels")
_SHARED = ("timestep_scale", "integer_timesteps", "clamp_fp16")  # taken over from the base


def check(path: str | pathlib.Path, wiring: str | None = None) -> None:
    """Says what can be said before its model is known; reads headers and JSON files.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: there is no ControlNet, or no such wiring, or `path` is no path.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(
            f"controlnet={path!r} is no path. Give a ControlNet's folder, a pipeline's, a .pth file, or OWNER/NAME on the hub."
        )
    if wiring is not None and wiring not in WIRINGS:
        raise ValueError(f"controlnet_wiring={wiring!r} is unknown; use one of {', '.join(WIRINGS)}.")
    file = native_files.find_file(path)
    if file is None:
        parts.read_config(CONTROLNET, path)
    elif parts.native_kind(file) is not CONTROLNET:
        raise ValueError(f"{file} has no ControlNet: no tensor is named controlnet.0.*")


def find(path: str | pathlib.Path, base: TransformerConfig, wiring: str | None = None) -> Source:
    """A ControlNet with the names and shapes of its tensors compared, for a transformer of the configuration `base`.

    Args:
      path: its folder, a folder with controlnet/ inside, or a file of the original code.
      base: of the transformer; clips, and the scale and kind of timesteps, are taken over.
      wiring: see `ControlNetConfig`; None: as the ControlNet says.

    Raises:
      FileNotFoundError, ValueError: as `check`, or it is damaged or of another model.
    """
    if base.guidance_embeds:
        raise ValueError(
            f"controlnet={path} is given, and a SANA-Sprint takes none; leave it out, or use the model it is of."
        )
    check(path, wiring)
    fields = {}
    if native_files.find_file(path) is not None:
        fields = {name: getattr(base, name) for name in _UNTOLD}
        # The stream after block 0, where the branch begins, has the position table already.
        fields["interpolation_scale"] = None
        if wiring == "diffusers" and base.interpolation_scale is not None:
            raise ValueError(
                f"controlnet_wiring='diffusers' begins the branch before the first block, where {path} would need the position "
                "table that its file does not speak of; leave controlnet_wiring out."
            )
    found = parts.find(CONTROLNET, path, fields=fields)
    config = found.module.config
    for name in _EQUAL:
        ours, theirs = getattr(config, name), getattr(base, name)
        if ours != theirs:
            raise ValueError(
                f"the ControlNet in {path} has {name}={ours} and the transformer {theirs}; give one of this model."
            )
    if config.num_layers >= base.num_layers:
        raise ValueError(
            f"the ControlNet in {path} has {config.num_layers} blocks for the {base.num_layers} of the transformer; give one of "
            "this model."
        )
    changes = {name: getattr(base, name) for name in _SHARED} | ({} if wiring is None else {"wiring": wiring})
    found = found._replace(module=SanaControlNet(dataclasses.replace(config, **changes)))
    parts.check(found)
    return found
