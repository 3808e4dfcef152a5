"""What a model on disk is and how it would be used, from JSON files and headers alone."""

import collections
import pathlib

from sana_jax.models import presets
from sana_jax.models.controlnet import ControlNetConfig
from sana_jax.models.text_encoder import TextEncoderConfig
from sana_jax.models.transformer import TransformerConfig
from sana_jax.prompts import COMPLEX_HUMAN_INSTRUCTION
from sana_jax.sampling import aspect_buckets
from sana_jax.weights import native_files
from sana_jax.weights.folder import find_pipeline, load_defaults
from sana_jax.weights.model_index import picture_geometry, pipeline_folder, read_json
from sana_jax.weights.parts import CONTROLNET, KINDS, TEXT_ENCODER, Source, check, find, native_kind
from sana_jax.weights.tensor_files import weight_files

# Public sizes by what tells them apart.
_SIZES = {
    "0.6B": presets.sana_600m(),
    "1.6B": presets.sana_1600m(),
    "2.4B": presets.sana15_2400m(),
    "3.2B": presets.sana15_3200m(),
    "4.8B": presets.sana15_4800m(),
}


def describe(path: str | pathlib.Path) -> list[str]:
    """Lines about a pipeline folder, a part's folder, a training run's folder or a file of the original code.

    Weights are compared with the configuration by name and shape; none is read.

    Raises:
      FileNotFoundError: there is nothing of the kind, or a file is missing; names it.
      ValueError: a file is damaged, or configuration and weights do not fit.
      pickle.UnpicklingError: a `.pth` file names what tensors do not need.
    """
    path = pathlib.Path(path)
    if (file := native_files.find_file(path)) is not None:
        source = find(native_kind(file), file)
        return [f"{path}: {_native_part(source)} in the original code's layout", *_part(source)]
    if (path / "config.json").is_file() and not (path / "run.json").is_file():  # a training run's is no part's
        kind = _kind(path)
        source = find(kind, path)
        return [f"{path}: {kind.subfolder} alone, in the diffusers layout", *_part(source, _files(kind, path))]
    folder = pipeline_folder(path)
    whole = find_pipeline(folder)
    found = dict(zip((kind.subfolder for kind in KINDS), whole[: len(KINDS)], strict=True))
    if whole.controlnet is not None:
        found[CONTROLNET.subfolder] = whole.controlnet
    pipeline = read_json(folder / "model_index.json").get("_class_name", "no _class_name")
    total = sum(_count(source) for source in found.values())
    family = _family(found["transformer"].module.config)
    lines = [f"{folder}: {family}, {_millions(total)} parameters ({pipeline}, diffusers layout)"]
    for name, source in found.items():
        lines += _part(source, _files(source.kind, folder / name), name)
    return [*lines, f"  tokenizer: {whole.tokenizer.get_vocab_size()} tokens", *_settings(folder)]


def _kind(folder: pathlib.Path):
    values = read_json(folder / "config.json")
    for kind in (*KINDS, CONTROLNET):
        if kind.class_name and kind.class_name == values.get("_class_name"):
            return kind
    if "model_type" in values:
        return TEXT_ENCODER
    classes = " or ".join(str(kind.class_name) for kind in (*KINDS, CONTROLNET) if kind.class_name)
    raise ValueError(
        f"{folder / 'config.json'} has _class_name={values.get('_class_name')!r}, not {classes}, and no model_type."
    )


def _family(config: TransformerConfig) -> str:
    name = "SANA-Sprint" if config.guidance_embeds else "SANA-1.5" if config.qk_norm else "SANA"
    for size, public in _SIZES.items():
        if (config.width, config.num_layers) == (public.width, public.num_layers):
            return f"{name} {size}"
    return f"{name}, not of a public size"


def _native_part(source: Source) -> str:
    config = source.module.config
    if isinstance(config, ControlNetConfig):
        return f"ControlNet of a SANA of width {config.width}"
    return f"{_family(config)}, transformer" if isinstance(config, TransformerConfig) else "autoencoder"


def _part(source: Source, files: list[str] | None = None, name: str | None = None) -> list[str]:
    check(source)
    used = [tensor for key, tensor in source.tensors.items() if not source.ignores(key)]
    dtypes = collections.Counter()
    for tensor in used:
        dtypes[tensor.dtype.name] += tensor.nbytes
    stored = ", ".join(f"{dtype} {nbytes / 1e6:.1f} MB" for dtype, nbytes in dtypes.most_common())
    config = source.module.config
    if isinstance(config, TextEncoderConfig):
        facts = f"{config.num_layers} layers, width {config.hidden_size}, {config.vocab_size} tokens, " + (
            f"soft-cap {config.attn_logit_softcap:g}" if config.attn_logit_softcap else "no soft-cap"
        )
    elif isinstance(config, TransformerConfig):
        facts = _transformer_facts(config)
    else:
        facts = (
            f"f{config.downsample_factor}c{config.latent_channels}, scaling factor {config.scaling_factor:g}, "
            f"down by {config.downsample_block_type}, up by {config.upsample_block_type}"
        )
    lines = [f"  {name or 'weights'}: {_millions(_count(source))} parameters; stored as {stored}", f"    {facts}"]
    return lines + [f"    {line}" for line in files or [f"used: {', '.join(file.name for file in source.files)}"]]


def _transformer_facts(config: TransformerConfig) -> str:
    table = (
        "no position table"
        if config.interpolation_scale is None
        else f"position table / {config.interpolation_scale:g}"
    )
    return ", ".join(
        [
            f"width {config.width}, {config.num_layers} blocks",
            f"{config.width // config.attention_head_dim} + {config.num_cross_attention_heads} heads",
            "q and k norms" if config.qk_norm else "no q and k norms",
            f"trained at {config.sample_size}x{config.sample_size} latents, {table}",
            "integer timesteps" if config.integer_timesteps else f"continuous timesteps x {config.timestep_scale:g}",
            f"eps {config.attention_eps:g} and {config.cross_norm_eps:g}",
            f"clamp_fp16 {'on' if config.clamp_fp16 else 'off'}",
            *([f"wiring {config.wiring}"] if isinstance(config, ControlNetConfig) else []),
        ]
    )


def _files(kind, folder: pathlib.Path) -> list[str]:
    """Which files would be read, and which lie beside them."""
    (used, file), *others = weight_files(folder, kind.stem).items()
    lines = [f"used: {file.name}" + (f" (variant {used})" if used else "")]
    if others:
        reason = "" if used else "; the plain files come first"
        lines.append(f"not used: {', '.join(other.name for _, other in others)}{reason}")
    return lines


def _settings(folder: pathlib.Path) -> list[str]:
    defaults = load_defaults(folder)
    geometry = picture_geometry(folder)
    binned = aspect_buckets.has_buckets(geometry.sample_size, geometry.downsample_factor)
    instruction = defaults.complex_human_instruction
    public = (
        "the public one" if instruction == COMPLEX_HUMAN_INSTRUCTION else f"{len(instruction or ())} lines of its own"
    )
    order = f", order {defaults.solver_order}" if defaults.solver == "flow_dpm" else ""
    times = "" if defaults.integer_timesteps else ", continuous timesteps"
    own = "sana_jax.json" if (folder / "sana_jax.json").is_file() else "no sana_jax.json: those of the public models"
    sides = "any, by resolution binning" if binned else f"multiples of {geometry.multiple}"
    picture = f"{geometry.height}x{geometry.width} pixels (sides: {sides})"
    sampling = f"{defaults.num_inference_steps} steps, guidance scale {defaults.guidance_scale:g}"
    return [
        f"  scheduler: {defaults.solver}{order}, flow shift {defaults.flow_shift:g}{times}",
        f"  defaults ({own}): {picture}, {sampling}",
        f"  text: {defaults.max_sequence_length} features; instruction before the prompt: {public if instruction else 'none'}",
    ]


def _count(source: Source) -> int:
    return sum(tensor.size for name, tensor in source.tensors.items() if not source.ignores(name))


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"
