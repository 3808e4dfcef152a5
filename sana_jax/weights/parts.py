"""The parts of a model, each alone: (module, parameters) from a folder in the diffusers layout, and back.

All but the text encoder are read from the original code's files too.

Parameters are read one at a time, straight to where they are wanted; see `layout`, `placement` and `cache`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from flax import linen as nn

from sana_jax.models import layers
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.controlnet import SanaControlNet
from sana_jax.models.text_encoder import TextEncoder
from sana_jax.models.transformer import SanaTransformer
from sana_jax.weights import autoencoder as autoencoder_weights
from sana_jax.weights import controlnet as controlnet_weights
from sana_jax.weights import (
    cache,
    fp16_releases,
    layout,
    lora,
    native,
    native_autoencoder,
    native_controlnet,
    native_files,
    setting_rules,
)
from sana_jax.weights import progress as progress_display
from sana_jax.weights import text_encoder as text_encoder_weights
from sana_jax.weights import transformer as transformer_weights
from sana_jax.weights.model_index import found_files, hint, no_folder, read_json
from sana_jax.weights.placement import Shardings, placed_by
from sana_jax.weights.tensor_files import check_dtype, open_tensors, write_json, write_tensors

MAX_SHARD_BYTES = 5 * 10**9
Part = tuple[nn.Module, dict]  # a module and its parameters


class _Kind(NamedTuple):
    """How one part stands in a folder."""

    subfolder: str
    stem: str  # of its weight files
    module: type[nn.Module]
    layout: object  # module with entries, config_from_json, config_to_json, RULES of the configuration's values
    inputs: Callable  # configuration -> shapes of the call's arguments
    class_name: str | None  # in config.json; None where the configuration's reader checks it
    native: object | None  # module with entries, config_from_tensors, IGNORED, of the original code's layout


def _transformer_inputs(c):
    shape = (1, c.patch_size, c.patch_size, c.in_channels)
    return shape, (1,), (1, 1, c.caption_channels), (1, 1), *([(1,)] if c.guidance_embeds else [])


def _controlnet_inputs(c):
    latents, timesteps, features, mask = _transformer_inputs(c)
    return latents, timesteps, latents, features, mask


def _autoencoder_inputs(c):
    return ((1, c.downsample_factor, c.downsample_factor, c.in_channels),)


TRANSFORMER = _Kind(
    subfolder="transformer",
    stem="diffusion_pytorch_model",
    module=SanaTransformer,
    layout=transformer_weights,
    inputs=_transformer_inputs,
    class_name=transformer_weights.CLASS_NAME,
    native=native,
)
AUTOENCODER = _Kind(
    subfolder="vae",
    stem="diffusion_pytorch_model",
    module=Autoencoder,
    layout=autoencoder_weights,
    inputs=_autoencoder_inputs,
    class_name=autoencoder_weights.CLASS_NAME,
    native=native_autoencoder,
)
TEXT_ENCODER = _Kind(
    subfolder="text_encoder",
    stem="model",
    module=TextEncoder,
    layout=text_encoder_weights,
    inputs=lambda c: ((1, 1), (1, 1)),
    class_name=None,
    native=None,
)


CONTROLNET = _Kind(
    subfolder="controlnet",
    stem="diffusion_pytorch_model",
    module=SanaControlNet,
    layout=controlnet_weights,
    inputs=_controlnet_inputs,
    class_name=controlnet_weights.CLASS_NAME,
    native=native_controlnet,
)

KINDS = (TRANSFORMER, AUTOENCODER, TEXT_ENCODER)  # that a pipeline has


class Source(NamedTuple):
    """A part found on disk, nothing of its weights read (but those of an old `.pth` layout)."""

    kind: _Kind
    module: nn.Module
    entries: Sequence[layout.Entry]
    tensors: Mapping  # public name -> StoredTensor, or array
    files: Sequence[pathlib.Path]  # that hold the weights
    where: str

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name is known and carries nothing for us."""
        return name.endswith("num_batches_tracked")  # batch norm's counter, used in training only


def read_config(kind: _Kind, path: str | pathlib.Path):
    """The configuration of a part, from its config.json alone.

    Raises:
      FileNotFoundError: there is no such folder or file.
      ValueError: the file describes another kind of part, or one that is not implemented, or has a value of another kind.
    """
    folder = part_folder(kind, path)
    values = read_json(folder / "config.json")
    found = values.get("_class_name", kind.class_name)
    if kind.class_name and found != kind.class_name:
        raise ValueError(
            f"{folder} holds a {found}, not a {kind.class_name}; give the folder of one, or of a pipeline that has one."
        )
    setting_rules.check(folder / "config.json", values, kind.layout.RULES)
    try:
        return kind.layout.config_from_json(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def find(
    kind: _Kind,
    path: str | pathlib.Path,
    *,
    clamp_fp16: bool | None = None,
    ema: bool = False,
    fields: Mapping = MappingProxyType({}),
) -> Source:
    """A part on disk: its configuration, and the headers of its weight files.

    Args:
      kind: of the part.
      path: a folder, or a file of the original code (`native_files.find_file`).
      clamp_fp16: see `load_transformer`; for the transformer only.
      ema, fields: see `load_transformer`; for a file of the original code only.

    Raises:
      FileNotFoundError: a folder or file is missing; names it.
      ValueError: a file is damaged, or the configuration describes no model of ours.
    """
    file = native_files.find_file(path) if kind.native else None
    if file is not None:
        return _find_native(kind, file, clamp_fp16, ema, fields)
    if ema or fields:
        given = ["ema=True"] * ema + [f"{name}={value!r}" for name, value in fields.items()]
        raise ValueError(
            f"{', '.join(given)}: only for a file of the original code; of {path} the config.json says what the model is."
        )
    folder = part_folder(kind, path)
    config = read_config(kind, folder)
    if kind is TRANSFORMER:
        config = dataclasses.replace(config, clamp_fp16=fp16_releases.choose_clamp(folder, clamp_fp16))
    module = kind.module(config)
    tensors = open_tensors(folder, kind.stem)
    files = sorted({tensor.file for tensor in tensors.values()})
    if kind is TEXT_ENCODER:
        tensors = text_encoder_weights.canonical(tensors)
    return Source(kind, module, kind.layout.entries(module.config), tensors, files, str(folder))


def with_lora(source: Source, change: lora.Lora, strength: float = 1.0) -> Source:
    """A transformer that was found, with a LoRA added to its weights; see `lora.add`, also for the errors."""
    return source._replace(tensors=lora.add(source.tensors, change, strength), files=[*source.files, change.file])


def native_kind(file: pathlib.Path) -> _Kind:
    """Which part a file of the original code holds, by its names; raises as `native_files.open_tensors`.

    CONTROLNET of one that holds its base too.
    """
    first_words = {name.partition(".")[0] for name in native_files.open_tensors(file)}
    return AUTOENCODER if "encoder" in first_words else CONTROLNET if "controlnet" in first_words else TRANSFORMER


def _find_native(kind: _Kind, file: pathlib.Path, clamp_fp16: bool | None, ema: bool, fields: Mapping) -> Source:
    tensors = native_files.open_tensors(file, ema)
    try:
        if kind is TRANSFORMER:
            fields = {"clamp_fp16": fp16_releases.choose_clamp(file, clamp_fp16), **fields}
            if fp16_releases.is_sprint_teacher(file) and "timestep_scale" not in fields:
                logging.warning("%s: timestep_scale=0.001, as the teacher of SANA-Sprint was trained.", file)
                fields["timestep_scale"] = 0.001
        elif kind is AUTOENCODER:
            fields = native_files.named_fields(file) | fields
        module = kind.module(kind.native.config_from_tensors(tensors, **fields))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    others = native_controlnet.is_of_base if kind is CONTROLNET else native_controlnet.is_of_controlnet
    tensors = {name: tensor for name, tensor in tensors.items() if name not in kind.native.IGNORED and not others(name)}
    return Source(kind, module, kind.native.entries(module.config), tensors, [file], str(file))


def check(source: Source) -> None:
    """Raises ValueError, which lists the misfits, where tensors and configuration do not fit by names and shapes."""
    abstract = abstract_params(source.module)
    layout.check(source.entries, source.tensors, abstract, ignore=source.ignores, where=source.where)


def read(
    source: Source,
    dtype: str = "float32",
    *,
    shardings: Shardings | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache_dir: str | pathlib.Path | None = None,
) -> Part:
    """A part that was found, with its weights; arguments and errors as `load_transformer`."""
    check_dtype(dtype)
    abstract = abstract_params(source.module)
    entries, tensors, ignore = source.entries, source.tensors, source.ignores
    if cache_dir is not None:
        check(source)
        entries, tensors = cache.converted(
            cache_dir, source.kind.subfolder, entries, tensors, abstract, dtype, source.files, source.where
        )
    params = layout.read(
        entries,
        tensors,
        abstract,
        ignore=ignore,
        where=source.where,
        dtype=jnp.dtype(dtype),
        place=placed_by(shardings),
        progress=progress or progress_display.display(source.where),
    )
    return source.module, params


def save(
    kind: _Kind,
    module: nn.Module,
    params: dict,
    path: str | pathlib.Path,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    home: pathlib.Path | None = None,
) -> None:
    """Writes a part of any kind into its own folder; as `save_transformer`.

    `home` is where the folder will stand once it is complete; None: where it is.
    """
    folder = pathlib.Path(path)
    tensors = layout.write(kind.layout.entries(module.config), layers.list_layers(jax.device_get(params)))
    if kind is AUTOENCODER:
        tensors |= autoencoder_weights.batch_counts(module.config)
    write_tensors(folder, kind.stem, tensors, dtype=dtype, max_shard_bytes=max_shard_bytes)
    values = kind.layout.config_to_json(module.config)
    if kind is TRANSFORMER and not module.config.clamp_fp16 and fp16_releases.origin(home or folder, values):
        values["clamp_fp16"] = False  # else the folder's name would have it clipped when it is read
    write_json(folder / "config.json", values)


def load_transformer(
    path: str | pathlib.Path,
    dtype: str = "float32",
    *,
    clamp_fp16: bool | None = None,
    shardings: Shardings | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache_dir: str | pathlib.Path | None = None,
    ema: bool = False,
    **fields,
) -> tuple[SanaTransformer, dict]:
    """The diffusion transformer of a folder or of a file of the original code: (module, parameters of `dtype`).

    Headers and shapes are compared first. Then one parameter after the other is assembled from its layers' tensors and
    put in its place, so that host memory holds one (stacked) parameter besides the result.

    Args:
      path: the transformer's own folder, a pipeline folder, or a training run's folder with `export/` inside; or a
        file of the original code: `.pth`, whose pickle is never executed, or safetensors.
      dtype: of the parameters, whatever the file has. The compute dtype is `module.config.dtype`, float32 here.
      clamp_fp16: clip self-attention to the range of float16. None: as config.json says, and where it says nothing, as
        the origin of the folder or file does, with a warning (`fp16_releases.choose_clamp`).
      shardings: where the parameters go: a tree of `jax.sharding.Sharding`, or a function (path as
        "blocks/self_attention/qkv/kernel", shape) -> sharding, or None for the default device. Of a sharded parameter
        each process reads what its own devices hold. Left out: NumPy arrays.
      progress: called with (bytes done, bytes in all) after every parameter. Left out: a line on the terminal, or in
        the log where there is none, for more than 1 GB.
      cache_dir: folder where the converted weights are kept, in our own layout: written at the first load of a source
        in a dtype, read at later ones. As large as the parameters; never cleared. Left out: none.
      ema: of a `.pth` file with both, read the averaged weights ("state_dict_ema") in place of "state_dict".
      **fields: of `TransformerConfig`, for a file of the original code, which has no configuration: what its tensors do
        not tell, as sample_size=64 or interpolation_scale=1.0. See `native.config_from_tensors` for what holds without.

    Raises:
      FileNotFoundError: a folder or file is missing; names it.
      ValueError: a file is damaged, or configuration and weights do not fit; lists the misfits.
      pickle.UnpicklingError: a `.pth` file names what tensors do not need; says what.
    """
    source = find(TRANSFORMER, path, clamp_fp16=clamp_fp16, ema=ema, fields=fields)
    return read(source, dtype, shardings=shardings, progress=progress, cache_dir=cache_dir)


def load_autoencoder(
    path: str | pathlib.Path,
    dtype: str = "float32",
    *,
    shardings: Shardings | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache_dir: str | pathlib.Path | None = None,
    **fields,
) -> tuple[Autoencoder, dict]:
    """The autoencoder of a folder or of a file of the original code; as `load_transformer`.

    Args:
      path: the autoencoder's own folder, a pipeline folder or a training run's; or a file of the original code, `.pth` or
        `.pt` or safetensors, or a copy of its folder on the hub (mit-han-lab/dc-ae-f32c32-sana-1.0).
      dtype, shardings, progress, cache_dir: as `load_transformer`.
      **fields: of `AutoencoderConfig`, for a file of the original code: what its tensors do not tell, as
        scaling_factor=0.3189. See `native_autoencoder.config_from_tensors` for what holds without.
    """
    source = find(AUTOENCODER, path, fields=fields)
    return read(source, dtype, shardings=shardings, progress=progress, cache_dir=cache_dir)


def load_text_encoder(
    path: str | pathlib.Path,
    dtype: str = "float32",
    *,
    shardings: Shardings | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache_dir: str | pathlib.Path | None = None,
) -> tuple[TextEncoder, dict]:
    """The text encoder of a folder (its own, or a pipeline's `text_encoder/`); as `load_transformer`."""
    source = find(TEXT_ENCODER, path)
    return read(source, dtype, shardings=shardings, progress=progress, cache_dir=cache_dir)


def save_transformer(module: SanaTransformer, params: dict, path: str | pathlib.Path, dtype: str = "float32", **kwargs):
    """Writes config.json and weights into the folder `path`, readable by diffusers.

    Args:
      module, params: as `load_transformer` gives them, or a pipeline's; parameters may be NumPy or JAX arrays.
      path: folder of this part alone; made where it does not exist. Earlier weights of the part in it are replaced.
      dtype: what the weights are stored in: "float32", "float16" or "bfloat16".
      **kwargs: `max_shard_bytes`, 5 GB by default.

    Raises:
      ValueError: an unknown `dtype`, or a parameter is not finite or not in its range.
    """
    save(TRANSFORMER, module, params, path, dtype, **kwargs)


def save_autoencoder(module: Autoencoder, params: dict, path: str | pathlib.Path, dtype: str = "float32", **kwargs):
    """Writes an autoencoder's folder; as `save_transformer`."""
    save(AUTOENCODER, module, params, path, dtype, **kwargs)


def save_text_encoder(module: TextEncoder, params: dict, path: str | pathlib.Path, dtype: str = "float32", **kwargs):
    """Writes a text encoder's folder, readable by transformers; as `save_transformer`."""
    save(TEXT_ENCODER, module, params, path, dtype, **kwargs)


def abstract_params(module: nn.Module) -> dict:
    """Shapes of a module's parameters, nothing computed."""
    return jax.tree.map(lambda x: x, _abstract_params(module))


@functools.lru_cache(maxsize=16)
def _abstract_params(module: nn.Module) -> dict:
    kind = next(kind for kind in (*KINDS, CONTROLNET) if isinstance(module, kind.module))
    dtype = jnp.int32 if kind is TEXT_ENCODER else jnp.float32
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in kind.inputs(module.config)]
    key = jax.eval_shape(jax.random.key, 0)  # abstract too, so that no device is woken up
    return jax.eval_shape(module.init, key, *inputs)["params"]


def part_folder(kind: _Kind, path: str | pathlib.Path) -> pathlib.Path:
    root = pathlib.Path(path)
    if not root.is_dir():
        raise FileNotFoundError(no_folder(path))
    run = (root / "run.json").is_file()  # a training run's folder, whose config.json is no part's
    candidates = [root / kind.subfolder, root / "export" / kind.subfolder, *([] if run else [root])]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{root} has no config.json in it, in {kind.subfolder}/ or in export/{kind.subfolder}/; give a part's folder, "
        f"a pipeline's or a training run's.{hint(found_files(root))}"
    )
