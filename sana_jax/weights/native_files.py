"""Files in the layout of the original code, NVlabs/Sana and mit-han-lab/efficientvit: where they lie and what they hold.

They carry no configuration. `native` and `native_autoencoder` infer it from names and shapes.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping

from sana_jax.weights import torch_pickle
from sana_jax.weights.fp16_releases import release_name
from sana_jax.weights.model_index import check_fetched, read_json
from sana_jax.weights.tensor_files import open_file

PICKLES = (".pth", ".pt")
STATE_DICTS = ("state_dict", "model", "module")  # where a training checkpoint keeps weights
# Scale of the latents by model name: it belonged to the diffusion models, and their files hold it, not these.
SCALING_FACTORS = {
    "dc-ae-f32c32-in-1.0": 0.3189,
    "dc-ae-f64c128-in-1.0": 0.2889,
    "dc-ae-f32c32-mix-1.0": 0.4552,
    "dc-ae-f64c128-mix-1.0": 0.4538,
}
AVERAGED = "state_dict_ema"  # and their average, read where there are no others, or on request


def find_file(path: str | pathlib.Path) -> pathlib.Path | None:
    """The original code's file that `path` is or holds; None: `path` is something else.

    That is a file with an ending of its own, or `model.safetensors` in a folder as the hub has it: without config.json, or
    with one that says no more than the model's name.
    """
    path = pathlib.Path(path)
    if path.suffix in (*PICKLES, ".safetensors") and not path.is_dir():
        return path
    file, config = path / "model.safetensors", path / "config.json"
    if file.is_file() and (not config.is_file() or read_json(config).keys() == {"model_name"}):
        return file
    return None


def named_fields(file: pathlib.Path) -> dict[str, float]:
    """Fields of `AutoencoderConfig` that an autoencoder's name tells: in config.json beside the file, the file's or its folder's."""
    config = file.parent / "config.json"
    named = str(read_json(config).get("model_name")) if config.is_file() else ""
    known = (name for name in (named, release_name(file), release_name(file.parent)) if name in SCALING_FACTORS)
    return {"scaling_factor": SCALING_FACTORS[name] for name in itertools.islice(known, 1)}


def open_tensors(file: pathlib.Path, ema: bool = False) -> dict:
    """Name -> tensor of a file's state dict, unread where the file's layout allows.

    Args:
      file: safetensors, or a pickle with a training checkpoint or a state dict alone.
      ema: take the averaged weights ("state_dict_ema") where there are both.

    Raises:
      FileNotFoundError: there is no such file.
      pickle.UnpicklingError: the file names something that tensors do not need; see `torch_pickle`.
      ValueError: the file is damaged or holds no state dict.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist.")
    check_fetched(file)
    held = open_file(file) if file.suffix == ".safetensors" else torch_pickle.load(file, lazy=True)
    held = held if isinstance(held, dict) else {}
    if ema and not isinstance(held.get(AVERAGED), dict):
        raise ValueError(f"{file} has no {AVERAGED!r}, it has {', '.join(map(str, held))}. Use ema=False.")
    wrapped = [key for key in (*STATE_DICTS, AVERAGED) if isinstance(held.get(key), dict)]
    tensors = held[AVERAGED if ema else wrapped[0]] if wrapped else held
    if not tensors:
        raise ValueError(
            f"{file} holds no dict of tensors, neither alone nor under {', '.join(STATE_DICTS)} or {AVERAGED}."
        )
    if strange := [name for name, value in tensors.items() if not hasattr(value, "shape")]:
        raise ValueError(f"{file}: {', '.join(map(repr, strange[:5]))} is no tensor; this is not a model's state dict.")
    return tensors


def check_fields(config_class: type, fields: Mapping) -> None:
    """Raises ValueError for a name in `fields` that the configuration does not have."""
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(
            f"{', '.join(unknown)}: no field of {config_class.__name__}; it has {', '.join(sorted(known))}."
        )


def shape_of(tensors: Mapping, name: str, axes: int, part: str) -> tuple[int, ...]:
    """The shape of a tensor that decides.

    Raises:
      ValueError: there is none of the name, or it has another number of axes.
    """
    if name not in tensors:
        raise ValueError(
            f"missing {name}, which {part} of the original code has; is this another part, "
            "or a file out of a diffusers folder (give the folder)?"
        )
    found = tuple(tensors[name].shape)
    if len(found) != axes:
        raise ValueError(f"misshapen {name}: is {list(found)}, {axes} axes are expected.")
    return found
