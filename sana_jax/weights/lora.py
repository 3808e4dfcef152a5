"""LoRA (Hu et al., 2021, arXiv 2106.09685): changes of low rank to a transformer's weights, as diffusers and PEFT write them.

A file holds, for modules of the public layout, MODULE.lora_A.weight [r, in] and MODULE.lora_B.weight [out, r], with which the
module's weight W [out, in] becomes W + strength * scale * B A. The scale is alpha / r, or alpha / sqrt(r) with `use_rslora`,
where MODULE.alpha, the file's metadata or PEFT's adapter_config.json beside it give alpha, and else 1, as in diffusers.
"""

import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping

from sana_jax.weights.layout import nearest
from sana_jax.weights.model_index import read_json
from sana_jax.weights.stored import Adapted, StoredTensor
from sana_jax.weights.tensor_files import open_file, read_metadata

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers and of PEFT
_PREFIXES = ("base_model.model.", "transformer.")
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


def choose_file(names: Iterable[str]) -> str | None:
    """Of a folder's file names, the one that is a LoRA's: of `FILES`, or the only .safetensors; None: there is none."""
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    known = [name for name in FILES if name in found]
    return known[0] if known else found[0] if len(found) == 1 else None


def find_file(path: str | pathlib.Path) -> pathlib.Path:
    """The file of a LoRA: `path`, or the one in the folder `path`.

    Raises:
      FileNotFoundError: there is no such file, or none in the folder, or several.
      ValueError: it is no safetensors file.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        name = choose_file(file.name for file in path.iterdir() if file.is_file())
        if name is None:
            raise FileNotFoundError(
                f"{path} has neither {' nor '.join(FILES)}, nor a single .safetensors file; give the LoRA's file."
            )
        return path / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no LoRA {path}: give a .safetensors file, or the folder of one.")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file, and other files of LoRAs are not read.")
    return path


def adapt(
    tensors: Mapping[str, StoredTensor], file: pathlib.Path, strength: float = 1.0
) -> dict[str, StoredTensor | Adapted]:
    """The tensors of a transformer with a LoRA added to those that it is of; none is read here.

    Args:
      tensors: by public name.
      file: of the LoRA.
      strength: 1 adds it as it was trained, 0 nothing.

    Raises:
      ValueError: the file is damaged, is no LoRA of this transformer or of a kind that is not implemented; or
        `strength` is no finite number.
    """
    if not math.isfinite(strength):
        raise ValueError(f"lora_scale={strength} is not a finite number; 1 is how the LoRA was trained.")
    found = {_without_prefix(name): tensor for name, tensor in open_file(file).items()}
    alphas = {name.removesuffix(".alpha"): tensor for name, tensor in found.items() if name.endswith(".alpha")}
    factors: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in found.items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = tensor
    others = [name for name in found if not (_FACTOR.fullmatch(name) or name.endswith(".alpha"))]
    if not factors:
        kind = f"it has {others[0]}, and no" if others else "it has no"
        raise ValueError(f"{file} is no LoRA as diffusers and PEFT write it: {kind} MODULE.lora_A.weight.")
    if others:
        raise ValueError(
            f"{file} has {others[0]} beside its factors of low rank; DoRA and biases are not implemented. Fuse it into its model in "
            "diffusers and save the whole."
        )
    settings, adapted = _settings(file), dict(tensors)
    for module, pair in sorted(factors.items()):
        name = f"{module}.weight"
        if name not in tensors:
            raise ValueError(
                f"{file} changes {module}, and this transformer has no {name}{nearest(name, list(tensors))}: it is of another "
                "model."
            )
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{file} has lora_{min(pair)} of {module} and not the other factor; fetch it again.")
        _check_shapes(file, module, tensors[name], pair)
        alpha = float(alphas[module][...].item()) if module in alphas else None
        scale = strength * _scale(settings, module, pair["A"].shape[0], alpha)
        adapted[name] = Adapted(tensors[name], pair["A"], pair["B"], scale)
    return adapted


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _settings(file: pathlib.Path) -> dict:
    """PEFT's settings: `lora_alpha`, `alpha_pattern`, `use_rslora`; empty where the file has none."""
    if (text := read_metadata(file).get("lora_adapter_metadata")) is not None:
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"{file}: its metadata is not readable JSON ({error}). Fetch or write it again."
            ) from error
    elif (beside := file.with_name("adapter_config.json")).is_file():
        values = read_json(beside)
    else:
        return {}
    settings = {name.removeprefix("transformer."): value for name, value in values.items()}
    if settings.get("use_dora"):
        raise ValueError(
            f"{file} is a DoRA, which is not implemented. Fuse it into its model in diffusers and save the whole."
        )
    patterns = settings.get("alpha_pattern") or {}
    for value in (settings.get("lora_alpha", 1), *patterns.values()):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"{file}: its settings have the alpha {value!r}, which is no number. Fetch or write it again."
            )
    return settings


def _scale(settings: dict, module: str, rank: int, alpha: float | None) -> float:
    """What the product of a module's factors is multiplied with."""
    if alpha is None:
        if "lora_alpha" not in settings:
            return 1.0
        patterns = settings.get("alpha_pattern") or {}
        own = (value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
        alpha = next(own, settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _check_shapes(file: pathlib.Path, module: str, weight: StoredTensor, pair: Mapping[str, StoredTensor]) -> None:
    down, up = pair["A"].shape, pair["B"].shape
    fits = len(down) > 1 and len(up) > 1 and down[0] == up[1] and up[0] == weight.shape[0]
    if not fits or math.prod(up[2:]) != 1 or math.prod(down[1:]) != math.prod(weight.shape[1:]):
        raise ValueError(
            f"{file}: lora_A {list(down)} and lora_B {list(up)} of {module} do not make its weight {list(weight.shape)}: it is of "
            "another model."
        )
