"""Which public checkpoints were trained in float16 and need its range as a clip, and how a folder shows that it is one.

Their training code clipped the output of every self-attention to +-65504. Nothing in their config.json says so, and
without the clip they give broken pictures in float32 and bfloat16 (diffusers issue 10336).
"""

import pathlib
from collections.abc import Mapping

from absl import logging

from sana_jax.weights.model_index import read_json

NAMES = (
    "Sana_600M_512px",
    "Sana_600M_512px_MultiLing",  # the .pth in Sana_600M_512px; below likewise
    "Sana_600M_1024px",
    "Sana_600M_1024px_MultiLing",
    "Sana_1600M_512px",
    "Sana_1600M_512px_MultiLing",
    "Sana_1600M_1024px",
    "Sana_1600M_1024px_MultiLing",
)
_KNOWN = {name.casefold(): name for name in NAMES}
_PART = "transformer"


def choose_clamp(folder: str | pathlib.Path, setting: bool | None) -> bool:
    """Whether to clip: as `setting` or the folder's own config.json says, else by what shows the folder's origin.

    The origin shows, in this order, in the name of the folder, of its pipeline or of its place in the hub's cache; in the
    `_name_or_path` that diffusers leaves in config.json and model_index.json; and in weights kept in an fp16 variant
    where the bf16-trained releases have a bf16 one (models with q and k norm, a position table or a guidance embedding
    aside: none of them was trained in float16). A clip that is chosen so is warned of, with the reason.

    Args:
      folder: of the transformer, with its config.json; or a `.pth` file, of which only the name can tell.
      setting: the caller's choice; None: none.
    """
    if setting is not None:
        return setting
    folder = pathlib.Path(folder)
    config = read_json(folder / "config.json") if folder.is_dir() else {}
    if "clamp_fp16" in config:
        return bool(config["clamp_fp16"])
    reason = origin(folder, config)
    if reason is None:
        return False
    logging.warning(
        "%s: self-attention is clipped to the range of float16 (clamp_fp16=True), because %s. The releases trained in "
        "float16 give broken pictures without. If this model is none of them, pass clamp_fp16=False, or (in a folder) "
        'write "clamp_fp16": false into its config.json.',
        folder,
        reason,
    )
    return True


def release_name(path: str | pathlib.PurePath) -> str:
    """NAME of a folder, of OWNER/NAME on the hub, or of a place in its cache (.../models--OWNER--NAME/snapshots/HASH).

    The subfolder of the transformer and the endings ".pth", ".safetensors" and "_diffusers" are left out.
    """
    path = pathlib.PurePath(path)
    path = path.parent if path.name == _PART else path
    cached = [part for part in path.parts if part.startswith("models--")]
    name = cached[-1].split("--")[-1] if cached else path.name
    for ending in (".pth", ".pt", ".safetensors", "_diffusers", "-diffusers"):
        name = name.removesuffix(ending)
    return name


def is_sprint_teacher(path: str | pathlib.PurePath) -> bool:
    """Whether a name is of the model that a SANA-Sprint was distilled from: a SANA-1.5 by its tensors, with timesteps of 0 to 1."""
    name = release_name(path).casefold()
    return name.startswith("sana_sprint") and name.endswith("teacher")


def is_told_by_name(path: str | pathlib.PurePath) -> bool:
    """Whether a name alone says that a model is such a release, or that it is none."""
    name = release_name(path).casefold()
    return name in _KNOWN or _is_bf16(name)


def _is_bf16(name: str) -> bool:
    return name.startswith("sana") and "bf16" in name


def origin(folder: pathlib.Path, config: Mapping) -> str | None:
    """What shows that a folder with this config.json is of such a release, for a message; None: nothing does."""
    index = folder.parent / "model_index.json"
    index = read_json(index) if folder.name == _PART and index.is_file() else {}
    shown = [(f"it stands in {place}", place) for place in (folder.absolute(), folder.resolve())]
    for file, values in (("config.json", config), ("model_index.json", index)):
        if values.get("_name_or_path"):
            shown.append((f"{file} has _name_or_path {values['_name_or_path']!r}", values["_name_or_path"]))
    names = []
    for evidence, path in shown:
        names.append(release_name(path).casefold())
        if names[-1] in _KNOWN:
            return f"{evidence} and {_KNOWN[names[-1]]} was trained in float16"
    if any(map(_is_bf16, names)):
        return None
    if config.get("qk_norm") or config.get("guidance_embeds") or config.get("interpolation_scale") is not None:
        return None
    if _variant(folder, "fp16") and not _variant(folder, "bf16"):
        found = _variant(folder, "fp16")[0]
        return f"it has {found} and no bf16 weights, as the releases trained in float16 have"
    return None


def _variant(folder: pathlib.Path, variant: str) -> list[str]:
    """Names of the weight files of a variant: whole, in shards, or the shards' index."""
    patterns = (f"*.{variant}.safetensors", f"*.{variant}-*.safetensors", f"*.safetensors.index.{variant}.json")
    return sorted(file.name for pattern in patterns for file in folder.glob(pattern))
