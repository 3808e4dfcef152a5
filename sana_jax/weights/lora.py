"""LoRA (Hu et al., 2021, arXiv 2106.09685): changes of low rank to a transformer's weights, as diffusers and PEFT write them.

A file holds, for modules of the public layout, MODULE.lora_A.weight [r, in] and MODULE.lora_B.weight [out, r] (elsewhere called
lora_down and lora_up), with which the module's weight W [out, in] becomes W + strength * scale * B A. The scale is alpha / r,
or alpha / sqrt(r) with `use_rslora`, where MODULE.alpha, the file's metadata or PEFT's adapter_config.json beside it give alpha,
and else 1.
"""

import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from sana_jax.models.transformer import SanaTransformer
from sana_jax.weights import transformer
from sana_jax.weights.layout import nearest
from sana_jax.weights.model_index import read_json
from sana_jax.weights.stored import Adapted, StoredTensor
from sana_jax.weights.tensor_files import open_file, read_metadata, write_tensors

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers and of PEFT
SETTINGS = "adapter_config.json"  # of PEFT, beside its file
_PREFIXES = ("base_model.model.", "diffusion_model.", "module.", "transformer.")
_FACTOR = re.compile(r"(.+)\.lora_(A|B|down|up)(?:\.default)?\.weight")
# Of PEFT's `init_lora_weights`: they change W itself before training.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")
_FUSE = "Fuse it into its model where it was trained, and save the whole."


class Change(NamedTuple):
    """Of one module's weight: scale * up @ down.

    Attributes:
      down, up: [r, in, ...] and [out, r], or [out, r, 1, 1].
      scale: of their product.
    """

    down: StoredTensor
    up: StoredTensor
    scale: float


class Lora(NamedTuple):
    """A LoRA on disk, of which nothing but alphas is read.

    Attributes:
      file: where it is.
      changes: by module, as "transformer_blocks.0.attn1.to_q".
    """

    file: pathlib.Path
    changes: Mapping[str, Change]


def choose_file(names: Iterable[str]) -> str | None:
    """Of a folder's file names, the one that is a LoRA's: of `FILES`, or the only .safetensors; None: there is none."""
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    known = [name for name in FILES if name in found]
    return known[0] if known else found[0] if len(found) == 1 else None


def find_file(path: str | os.PathLike) -> pathlib.Path:
    """The file of a LoRA: `path`, or the one in the folder `path`, which may be a training run's with `export/` inside.

    Raises:
      FileNotFoundError: there is no such file, or none in the folder, or several.
      ValueError: it is no safetensors file, or `path` is no path.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(
            f"lora={path!r} is no path. Give one .safetensors file, a folder with one, or OWNER/NAME on the hub."
        )
    path = pathlib.Path(path)
    if path.is_dir():
        for folder in (path, path / "export"):
            name = choose_file(file.name for file in folder.glob("*") if file.is_file())
            if name is not None:
                return folder / name
        raise FileNotFoundError(
            f"{path} has neither {' nor '.join(FILES)}, nor a single .safetensors file; give the LoRA's file."
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no LoRA {path}: give a .safetensors file, or the folder of one.")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file, and other files of LoRAs are not read.")
    return path


def open_lora(path: str | os.PathLike) -> Lora:
    """The LoRA at `path`, a file or its folder.

    Raises:
      FileNotFoundError: as `find_file`.
      ValueError: the file is damaged, no LoRA, or of a kind that is not implemented.
    """
    file = find_file(path)
    factors: dict[str, dict[str, StoredTensor]] = {}
    alphas, others = {}, []
    for name, tensor in open_file(file).items():
        name = _without_prefix(name)
        if match := _FACTOR.fullmatch(name):
            side = "A" if match[2] in ("A", "down") else "B"
            factors.setdefault(match[1], {})[side] = tensor
        elif name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = _read_alpha(file, name, tensor)
        else:
            others.append(name)
    if not factors:
        kind = f"it has {others[0]}, and no" if others else "it has no"
        raise ValueError(f"{file} is no LoRA as diffusers and PEFT write it: {kind} MODULE.lora_A.weight.")
    if others:
        raise ValueError(
            f"{file} has {others[0]} beside its factors of low rank; DoRA, biases and whole weights are not implemented. {_FUSE}"
        )
    if lost := sorted(alphas.keys() - factors.keys()):
        raise ValueError(f"{file} has an alpha of {lost[0]} and no factors of it. Fetch or write it again.")
    settings = _read_settings(file)
    changes = {}
    for module, pair in sorted(factors.items()):
        if set(pair) != {"A", "B"}:
            raise ValueError(
                f"{file} has lora_{min(pair)} of {module} and not the other factor. Fetch or write it again."
            )
        down, up = pair["A"].shape, pair["B"].shape
        if len(down) < 2 or len(up) < 2 or not 0 < down[0] == up[1] or math.prod(up[2:]) != 1:
            raise ValueError(f"{file}: lora_A {list(down)} and lora_B {list(up)} of {module} have no product.")
        changes[module] = Change(pair["A"], pair["B"], _scale(settings, module, down[0], alphas.get(module)))
    return Lora(file, changes)


def add(tensors: Mapping[str, StoredTensor], lora: Lora, strength: float = 1.0) -> dict[str, StoredTensor | Adapted]:
    """The tensors of a transformer with a LoRA added to those that it is of; none is read here.

    Args:
      tensors: by public name.
      lora: as `open_lora` gives it.
      strength: 1 adds it as it was trained, 0 nothing.

    Raises:
      ValueError: it is no LoRA of this transformer; or `strength` is no finite number.
    """
    if not math.isfinite(strength):
        raise ValueError(f"lora_scale={strength} is not a finite number; 1 is how the LoRA was trained.")
    sums = dict(tensors)
    for module, (down, up, scale) in lora.changes.items():
        name = f"{module}.weight"
        if name not in tensors:
            whose = (
                "which is the text encoder's" if module.startswith("text_encoder") else "which this transformer has not"
            )
            raise ValueError(
                f"{lora.file} changes {module}, {whose}{nearest(name, list(tensors))}. LoRAs of the transformer alone are read."
            )
        shape = tensors[name].shape
        if up.shape[0] != shape[0] or math.prod(down.shape[1:]) != math.prod(shape[1:]):
            grouped = len(shape) == 4 and down.shape[2:] == shape[2:] and shape[2:] != (1, 1)
            why = "a grouped convolution, of which LoRAs are not implemented" if grouped else "it is of another model"
            raise ValueError(
                f"{lora.file}: lora_A {list(down.shape)} and lora_B {list(up.shape)} of {module} do not make its weight "
                f"{list(shape)}: {why}."
            )
        sums[name] = Adapted(tensors[name], down, up, strength * scale)
    return sums


def save(
    path: str | os.PathLike, module: SanaTransformer, factors: dict, scale: float = 1.0, dtype: str = "float32"
) -> None:
    """Writes a LoRA as diffusers does: pytorch_lora_weights.safetensors in the folder `path`, which is made where it is not there.

    The product's scale goes into lora_B, so that readers who know of no alpha need none.

    Args:
      path: folder. An earlier LoRA in it is replaced.
      module: the transformer that the LoRA is of.
      factors: `lora_down` [layers, C, ..., r] and `lora_up` [layers, ..., r, D] in place of kernels (`training.lora`).
      scale: of their product.
      dtype: what they are stored in: "float32", "float16" or "bfloat16".

    Raises:
      ValueError: an unknown `dtype`, or a factor is not finite or not in its range.
    """
    flat, tensors = traverse_util.flatten_dict(factors, sep="/"), {}
    for entry in transformer.entries(module.config):
        kernel = entry.path.removesuffix("/kernel")
        if f"{kernel}/lora_down" not in flat:
            continue
        down, up = (np.asarray(flat[f"{kernel}/lora_{name}"], np.float32) for name in ("down", "up"))
        factors_of = {"A": down, "B": np.float32(scale) * up}
        for side, value in factors_of.items():
            # As kernels, [layers, C, (k,) r] and [layers, r, (k,) D], they are laid out by the kernel's own entry.
            kernel_like = np.moveaxis(value, 1, 2) if side == "B" and len(entry.names) > 1 else value
            for name, tensor in entry.scatter(kernel_like).items():
                tensors[f"transformer.{name.removesuffix('.weight')}.lora_{side}.weight"] = tensor
    stem = FILES[0].removesuffix(".safetensors")
    write_tensors(pathlib.Path(path), stem, tensors, dtype=dtype, max_shard_bytes=sys.maxsize)


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _read_alpha(file: pathlib.Path, name: str, tensor: StoredTensor) -> float:
    if tensor.size != 1 or not math.isfinite(alpha := float(tensor[...].reshape(()))):
        raise ValueError(f"{file}: {name} is not one finite number. Fetch or write it again.")
    return alpha


def _read_settings(file: pathlib.Path) -> dict:
    """Of PEFT's settings `lora_alpha`, `alpha_pattern` and `use_rslora`; empty where the file has none."""
    if (text := read_metadata(file).get("lora_adapter_metadata")) is not None:
        where = f"{file}: its metadata"
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not readable JSON ({error}). Fetch or write it again.") from error
    elif file.name == FILES[1] and (beside := file.with_name(SETTINGS)).is_file():
        where, values = str(beside), read_json(beside)
    else:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{where} is no object of JSON. Fetch or write it again.")
    settings = {name.removeprefix("transformer."): value for name, value in values.items()}
    if settings.get("use_dora"):
        raise ValueError(f"{where} says that it is a DoRA, which is not implemented. {_FUSE}")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise ValueError(
            f"{where} has init_lora_weights={start!r}: it was trained beside other weights than the model's. Convert it with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{where} has the alpha_pattern {patterns!r}, which is no object. Fetch or write it again.")
    for pattern in patterns:
        if not re.fullmatch(r"\^?[\w.]+", pattern):  # a pattern may run without end
            raise ValueError(
                f"{where} has an alpha for {pattern!r}; only whole names of modules are implemented there. {_FUSE}"
            )
    for value in (settings.get("lora_alpha", 1), *patterns.values()):
        if not isinstance(value, int | float) or not abs(value) < 1e9:
            raise ValueError(f"{where} has the alpha {value!r:.40}, which is no number. Fetch or write it again.")
    return settings


def _scale(settings: Mapping, module: str, rank: int, alpha: float | None) -> float:
    """What the product of a module's factors is multiplied with."""
    if alpha is None:
        if "lora_alpha" not in settings:
            return 1.0
        patterns = settings.get("alpha_pattern") or {}
        own = (value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
        alpha = next(own, settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
