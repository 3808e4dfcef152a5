"""Model folders on the Hugging Face hub: of a repository, the files that are read here, and no others."""

import glob
import re
from collections.abc import Sequence

from sana_jax.weights import fp16_releases, lora
from sana_jax.weights.model_index import has_controlnet, hint, pipeline_family
from sana_jax.weights.native_files import PICKLES
from sana_jax.weights.parts import CONTROLNET, KINDS, TRANSFORMER, read_config
from sana_jax.weights.tensor_files import variant_names


def download(hub_id: str, revision: str | None = None, dtype: str = "float32") -> str:
    """The local folder of OWNER/NAME, from the hub or, where that cannot be reached, from the user's cache of it.

    Args:
      revision: a commit, tag or branch; None: the newest.
      dtype: that the weights will have, see `wanted_files`.

    Raises:
      As `download_configs`.
    """
    folder, names = download_configs(hub_id, revision)
    if names is None:
        return folder
    kinds = (*KINDS, CONTROLNET) if has_controlnet(folder) else KINDS
    return _fetch(hub_id, revision, allow_patterns=wanted_files(hub_id, names, dtype, kinds))


def download_configs(hub_id: str, revision: str | None = None) -> tuple[str, list[str] | None]:
    """What comes before the weights: the local folder with the configurations of a model, and the names of all its files.

    Where the hub cannot be reached, what the user's cache has of it, weights and all, and None.

    Raises:
      ValueError: it is of another kind of model.
      FileNotFoundError: the hub has or gives no such repository or revision, or it is of something else.
    """
    names, reason = _names(hub_id, revision)
    if names is not None and not {"model_index.json", "export/model_index.json"} & set(names):
        raise FileNotFoundError(f"{hub_id} on the hub has no model_index.json: no model that draws.{hint(names)}")
    if names is None:
        return _fetch(hub_id, revision, reason, local_files_only=True), None
    wanted = [name for name in wanted_files(hub_id, names) if name.endswith(".json")]
    folder = _fetch(hub_id, revision, allow_patterns=wanted)
    pipeline_family(folder)
    for kind in KINDS:
        read_config(kind, folder)
    return folder, names


def download_lora(hub_id: str) -> str:
    """The local file of the LoRA OWNER/NAME, or a folder with it and its settings.

    Raises:
      FileNotFoundError: the hub has or gives no such repository, or it has no LoRA.
    """
    names, reason = _names(hub_id, None)
    if names is None:
        return _fetch(hub_id, None, reason, local_files_only=True)
    file = lora.choose_file(names)
    if file is None:
        raise FileNotFoundError(
            f"{hub_id} on the hub has neither {' nor '.join(lora.FILES)}, nor a single .safetensors file; fetch the LoRA's file and "
            "give that."
        )
    wanted = [glob.escape(file), lora.SETTINGS]  # the hub's library takes names for patterns
    return f"{_fetch(hub_id, None, allow_patterns=wanted)}/{file}"


def download_controlnet(hub_id: str, dtype: str = "float32") -> str:
    """The local folder of the ControlNet OWNER/NAME, or its file of the original code.

    Raises:
      FileNotFoundError: the hub has or gives no such repository, or it has no ControlNet.
    """
    names, reason = _names(hub_id, None)
    if names is None:
        return _fetch(hub_id, None, reason, local_files_only=True)
    for root in ("", f"{CONTROLNET.subfolder}/"):
        wanted = _weights_of(CONTROLNET, names, root, dtype)
        if f"{root}config.json" in names and wanted:
            return _fetch(hub_id, None, allow_patterns=[glob.escape(name) for name in (f"{root}config.json", *wanted)])
    files = [name for name in names if name.endswith(PICKLES)]
    if len(files) != 1:
        raise FileNotFoundError(
            f"{hub_id} on the hub has no ControlNet in diffusers' layout, nor a single {' or '.join(PICKLES)} file of the original "
            "code; fetch the ControlNet's file and give that."
        )
    return f"{_fetch(hub_id, None, allow_patterns=[glob.escape(files[0])])}/{files[0]}"


def _names(hub_id: str, revision: str | None) -> tuple[list[str] | None, Exception | None]:
    """(names of a repository's files, None); or, where the hub does not tell, (None, why)."""
    import huggingface_hub

    # Which errors a missing network or repository gives depends on the version and on the HTTP library it uses.
    try:
        found = huggingface_hub.model_info(hub_id, revision=revision).siblings or ()
    except Exception as error:  # noqa: BLE001
        return None, error
    return [file.rfilename for file in found], None


def _fetch(hub_id: str, revision: str | None, reason: Exception | None = None, **asked) -> str:
    """The local folder of a repository; `reason` is why the hub was not asked, if it was not."""
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(hub_id, revision=revision, **asked)
    except Exception as error:
        cause = reason or error
        text = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        what = "that name" if revision is None else f"that name and revision {revision}"
        raise FileNotFoundError(f"no folder {hub_id} here, and the hub gave nothing by {what}: {text}") from cause


def wanted_files(hub_id: str, names: Sequence[str], dtype: str = "float32", kinds: Sequence = KINDS) -> list[str]:
    """Of a repository's file names, those of configurations, tokenizer and of the weights that `open_tensors` reads.

    A bf16 copy is wanted in place of the plain files where the weights are to be bfloat16: half the bytes, the same numbers. Where
    nothing but an fp16 copy of the transformer could show that the model was trained in float16
    (`fp16_releases.choose_clamp`), the copy is wanted too.
    """
    root = "" if "model_index.json" in names else "export/"
    wanted = [name for name in names if name.endswith(".json") and ".safetensors.index." not in name]
    wanted += [name for name in names if name.startswith(f"{root}tokenizer/")]
    for kind in kinds:
        told = kind is not TRANSFORMER or fp16_releases.is_told_by_name(hub_id)
        wanted += _weights_of(kind, names, f"{root}{kind.subfolder}/", dtype, has_told_origin=told)
    return sorted(set(wanted))


def _weights_of(kind, names: Sequence[str], folder: str, dtype: str, has_told_origin: bool = True) -> list[str]:
    """The weight files of one part in `folder`, "" or with a slash at its end; an fp16 copy too where it is to tell the origin."""
    inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
    variants = variant_names(inside, kind.stem)
    read = ["bf16"] if dtype == "bfloat16" and "bf16" in variants else list(variants)[:1]
    if not has_told_origin and "fp16" in variants and "bf16" not in variants:
        read.append("fp16")
    return [f"{folder}{name}" for variant in read for name in _weights(inside, kind.stem, variant, variants[variant])]


def _weights(names: Sequence[str], stem: str, variant: str, first: str) -> list[str]:
    """The weight files of a variant: `first` alone, or `first` as an index and its shards."""
    if not first.endswith(".json"):
        return [first]
    infix = re.escape(f".{variant}" if variant else "")
    # diffusers put the variant after the number once, and puts it before the number now.
    shard = re.compile(rf"{re.escape(stem)}({infix}-\d+-of-\d+|-\d+-of-\d+{infix})\.safetensors")
    return [first, *filter(shard.fullmatch, names)]
