"""From sections of a config to the frozen configs of the models, with errors that say which field to change."""

import dataclasses
import difflib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from sana_jax.data.captions import CaptionConfig
from sana_jax.data.loader import LoaderConfig

C = TypeVar("C")

# Fields of the transformer's config that ask for kernels.
IMPLEMENTATIONS = ("attention_implementation", "feed_forward_implementation")
# Fields in which a model may differ from the weights that it starts from, where the config says so: its timesteps, and what it has
# beside those weights, which then starts at random.
INIT_ADAPTS = ("timestep_scale", "integer_timesteps", "qk_norm", "guidance_embeds", "guidance_embeds_scale")


def nearest(name: str, names) -> str:
    """ "; did you mean X?" with the closest of `names`, or "" where none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def model_config(cls: type[C], section: ConfigDict | Mapping[str, Any], dtype: str, where: str) -> C:
    """The frozen config dataclass `cls` from a section of the config tree.

    Args:
      cls: TransformerConfig, AutoencoderConfig or TextEncoderConfig.
      section: its fields; those left out keep the class's defaults.
      dtype: compute dtype, which is one field for the whole run.
      where: the section's name, for errors.

    Raises:
      ValueError: a field that `cls` does not have, or values that cannot be.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    for name in section:
        if name not in names:
            raise ValueError(f"config.{where}.{name} is no field of {cls.__name__}{nearest(name, names)}")
    try:
        return cls(**{name: section[name] for name in section}, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"config.{where}: {error}") from error


def check_folder(name: str, value: str) -> None:
    """Of a folder that a run writes to; makes nothing.

    Raises:
      ValueError: it is an address (gs://), and its files are appended to, renamed and mapped; or it cannot be made or written
        to. Says so of `name`, which is how it was given.
    """
    _, found, place = str(value).partition("://")
    if found:
        raise ValueError(
            f"{name}={value} is no folder of the file system. Use one that all hosts see: a file server, or the bucket "
            f"mounted where folders can be renamed (gcsfuse: with a hierarchical namespace), e.g. {name}=/mnt/{place}"
        )
    folder = pathlib.Path(value).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{name}={value} cannot be written to: {there} is no folder, or one that this user may not write to. Use "
            "another."
        )


def is_adapted(config: ConfigDict) -> bool:
    """Whether an adapter of the transformer trains, a LoRA or a ControlNet, in place of the transformer itself."""
    return config.lora.rank > 0 or config.controlnet.num_layers > 0


def loader_config(section: ConfigDict, **changes) -> LoaderConfig:
    """The loader's config from the section `data`, with `changes`.

    Raises:
      ValueError: a value that cannot be.
    """
    values = {name: section[name] for name in section} | changes
    values["captions"] = CaptionConfig(**{name: section.captions[name] for name in section.captions})
    try:
        return LoaderConfig(**values)
    except ValueError as error:
        raise ValueError(f"config.data: {error}") from error


def check_sides(config: ConfigDict, multiple: int, why: str) -> None:
    """Raises ValueError where the pictures have a side that is no multiple of what the model divides them by, for the reason `why`."""
    size = config.data.image_size
    if size % multiple:
        raise ValueError(
            f"data.image_size={size} is not a multiple of {multiple} ({why}). Use a multiple of {multiple}."
        )
    for ratio, height, width in loader_config(config.data).buckets:
        if height % multiple or width % multiple:
            raise ValueError(
                f"data.aspect_ratios has {ratio}, which at data.image_size={size} is {height}x{width} pixels, and {multiple} "
                f"({why}) does not divide both. Leave this ratio out."
            )


def check_platform(model: ConfigDict, platform: str) -> None:
    """Raises ValueError where the config asks for kernels that the devices of `platform` do not run."""
    for name in IMPLEMENTATIONS:
        chosen = model.get(name, "auto")
        needed = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}.get(chosen, platform)
        if needed != platform:
            raise ValueError(
                f"config.model.{name}={chosen!r} runs on a {needed.upper()}, and this run's devices are of platform "
                f"{platform!r}. Use 'auto'."
            )
