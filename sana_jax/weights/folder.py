"""Model folders in the diffusers layout: each part alone, or a whole pipeline, read and written.

FOLDER/model_index.json                     written last: a folder without it is not complete
       transformer/   config.json, diffusion_pytorch_model.safetensors
       vae/           the same
       text_encoder/  config.json, model.safetensors
       tokenizer/     tokenizer.json
       scheduler/     scheduler_config.json: solver and flow shift
       sana_jax.json  ours: the other sampling defaults; absent from public folders
"""

import dataclasses
import difflib
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tokenizers import Tokenizer

from sana_jax import tokenizer as tokenizers
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.text_encoder import TextEncoder
from sana_jax.models.transformer import SanaTransformer
from sana_jax.prompts import COMPLEX_HUMAN_INSTRUCTION, MAX_SEQUENCE_LENGTH, instruction_lines
from sana_jax.weights import autoencoder as autoencoder_weights
from sana_jax.weights import fp16_releases, layout, pag
from sana_jax.weights import text_encoder as text_encoder_weights
from sana_jax.weights import transformer as transformer_weights
from sana_jax.weights.model_index import pipeline_family, pipeline_folder, read_json
from sana_jax.weights.scheduler import scheduler_from_json, scheduler_to_json
from sana_jax.weights.tensor_files import read_tensors, write_json, write_tensors

MAX_SHARD_BYTES = 5 * 10**9
Part = tuple[nn.Module, dict]  # a module and its parameters


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """How a model is sampled unless the call says otherwise. The defaults are those of the public SANA models.

    Attributes:
      complex_human_instruction: lines put before every prompt; None for none.
      lower_case: whether prompts are lower-cased, as in diffusers; the original code leaves them as they are.
      max_sequence_length: text features per prompt.
      height, width: of the picture; None: what the transformer was trained at.
      num_inference_steps, guidance_scale: see `SanaPipeline.__call__`.
      solver: "flow_dpm" or "flow_euler"; "scm" says that the model is a SANA-Sprint, which is sampled in no other way.
      solver_order: of flow_dpm.
      flow_shift: 3.0 up to 2K, 6.0 at 4K.
      pag_scale, pag_adaptive_scale, pag_layers: perturbed attention guidance; a scale of 0 is none.
    """

    complex_human_instruction: tuple[str, ...] | None = COMPLEX_HUMAN_INSTRUCTION
    lower_case: bool = True
    max_sequence_length: int = MAX_SEQUENCE_LENGTH
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 20
    guidance_scale: float = 4.5
    solver: str = "flow_dpm"
    solver_order: int = 2
    flow_shift: float = 3.0
    pag_scale: float = 0.0
    pag_adaptive_scale: float = 0.0
    pag_layers: tuple[int, ...] = (0,)

    @property
    def family(self) -> str:
        """Either "sana" or "sprint"."""
        return "sprint" if self.solver == "scm" else "sana"


SCHEDULER_FIELDS = (
    "solver",
    "solver_order",
    "flow_shift",
)  # kept in scheduler_config.json, the others in sana_jax.json


PIPELINE_CLASSES = {"sana": "SanaPipeline", "sprint": "SanaSprintPipeline"}  # what diffusers calls the families


class PipelineParts(NamedTuple):
    """What a pipeline folder holds."""

    transformer: Part
    autoencoder: Part
    text_encoder: Part
    tokenizer: Tokenizer
    defaults: SamplingDefaults


class _Kind(NamedTuple):
    """How one part stands in a folder."""

    subfolder: str
    stem: str  # of its weight files
    module: type[nn.Module]
    layout: object  # module with entries, config_from_json, config_to_json
    inputs: Callable  # configuration -> shapes of the call's arguments
    class_name: str | None  # in config.json; None where the configuration's reader checks it


def _transformer_inputs(c):
    shape = (1, c.patch_size, c.patch_size, c.in_channels)
    return shape, (1,), (1, 1, c.caption_channels), (1, 1), *([(1,)] if c.guidance_embeds else [])


def _autoencoder_inputs(c):
    return ((1, c.downsample_factor, c.downsample_factor, c.in_channels),)


TRANSFORMER = _Kind(
    subfolder="transformer",
    stem="diffusion_pytorch_model",
    module=SanaTransformer,
    layout=transformer_weights,
    inputs=_transformer_inputs,
    class_name=transformer_weights.CLASS_NAME,
)
AUTOENCODER = _Kind(
    subfolder="vae",
    stem="diffusion_pytorch_model",
    module=Autoencoder,
    layout=autoencoder_weights,
    inputs=_autoencoder_inputs,
    class_name=autoencoder_weights.CLASS_NAME,
)
TEXT_ENCODER = _Kind(
    subfolder="text_encoder",
    stem="model",
    module=TextEncoder,
    layout=text_encoder_weights,
    inputs=lambda c: ((1, 1), (1, 1)),
    class_name=None,
)


def _load(kind: _Kind, path: str | pathlib.Path, dtype: str = "float32") -> Part:
    folder = _part_folder(kind, path)
    values = read_json(folder / "config.json")
    found = values.get("_class_name", kind.class_name)
    if kind.class_name and found != kind.class_name:
        raise ValueError(f"{folder} holds a {found}, not a {kind.class_name}; give the folder of the whole pipeline.")
    try:
        module = kind.module(kind.layout.config_from_json(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    tensors = read_tensors(folder, kind.stem)
    if kind is TEXT_ENCODER:
        tensors = text_encoder_weights.canonical(tensors)
    params = layout.read(
        kind.layout.entries(module.config),
        tensors,
        abstract_params(module),
        ignore=lambda name: name.endswith("num_batches_tracked"),  # batch norm's counter, used in training only
        where=str(folder),
    )
    return module, jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)


def _save(
    kind: _Kind,
    module: nn.Module,
    params: dict,
    path: str | pathlib.Path,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    folder = pathlib.Path(path)
    tensors = layout.write(kind.layout.entries(module.config), jax.device_get(params))
    write_tensors(folder, kind.stem, tensors, dtype=dtype, max_shard_bytes=max_shard_bytes)
    write_json(folder / "config.json", kind.layout.config_to_json(module.config))


def load_transformer(
    path: str | pathlib.Path, dtype: str = "float32", *, clamp_fp16: bool | None = None
) -> tuple[SanaTransformer, dict]:
    """The diffusion transformer of a folder: (module, parameters as NumPy arrays of `dtype`).

    Args:
      path: the transformer's own folder, a pipeline folder, or a training run's folder with `export/` inside.
      dtype: of the parameters, whatever the file has. The compute dtype is `module.config.dtype`, float32 here.
      clamp_fp16: clip self-attention to the range of float16. None: as config.json says, and where it says nothing, as
        the folder's origin does, with a warning (`fp16_releases.choose_clamp`).

    Raises:
      FileNotFoundError: a folder or file is missing; names it.
      ValueError: a file is damaged, or configuration and weights do not fit; lists every misfit.
    """
    module, params = _load(TRANSFORMER, path, dtype)
    clamp = fp16_releases.choose_clamp(_part_folder(TRANSFORMER, path), clamp_fp16)
    return SanaTransformer(dataclasses.replace(module.config, clamp_fp16=clamp)), params


def load_autoencoder(path: str | pathlib.Path, dtype: str = "float32") -> tuple[Autoencoder, dict]:
    """The autoencoder of a folder (its own, or a pipeline's `vae/`); as `load_transformer`."""
    return _load(AUTOENCODER, path, dtype)


def load_text_encoder(path: str | pathlib.Path, dtype: str = "float32") -> tuple[TextEncoder, dict]:
    """The text encoder of a folder (its own, or a pipeline's `text_encoder/`); as `load_transformer`."""
    return _load(TEXT_ENCODER, path, dtype)


def save_transformer(module: SanaTransformer, params: dict, path: str | pathlib.Path, dtype: str = "float32", **kwargs):
    """Writes config.json and weights into the folder `path`, readable by diffusers.

    Args:
      module, params: as `load_transformer` gives them; parameters may be NumPy or JAX arrays.
      path: folder of this part alone; made where it does not exist. Earlier weights of the part in it are replaced.
      dtype: what the weights are stored in: "float32", "float16" or "bfloat16".
      **kwargs: `max_shard_bytes`, 5 GB by default.

    Raises:
      ValueError: a parameter is not finite, or not in the range of `dtype`.
    """
    _save(TRANSFORMER, module, params, path, dtype, **kwargs)


def save_autoencoder(module: Autoencoder, params: dict, path: str | pathlib.Path, dtype: str = "float32", **kwargs):
    """Writes an autoencoder's folder; as `save_transformer`."""
    _save(AUTOENCODER, module, params, path, dtype, **kwargs)


def save_text_encoder(module: TextEncoder, params: dict, path: str | pathlib.Path, dtype: str = "float32", **kwargs):
    """Writes a text encoder's folder, readable by transformers; as `save_transformer`."""
    _save(TEXT_ENCODER, module, params, path, dtype, **kwargs)


def load_pipeline(path: str | pathlib.Path, dtype: str = "float32", *, clamp_fp16: bool | None = None) -> PipelineParts:
    """All parts of a pipeline folder, checked to fit each other. `clamp_fp16`: see `load_transformer`.

    Raises:
      FileNotFoundError: a folder or file is missing; names it.
      ValueError: a part is damaged, of a kind not implemented, or does not fit another one.
    """
    folder = pipeline_folder(path)
    parts = PipelineParts(
        transformer=load_transformer(folder, dtype, clamp_fp16=clamp_fp16),
        autoencoder=load_autoencoder(folder, dtype),
        text_encoder=load_text_encoder(folder, dtype),
        tokenizer=tokenizers.load(folder),
        defaults=load_defaults(folder),
    )
    transformer, autoencoder, text = (part[0].config for part in parts[:3])
    sprint = parts.defaults.family == "sprint"
    if transformer.guidance_embeds != sprint:
        raise ValueError(
            f"{folder}: the transformer has guidance_embeds={transformer.guidance_embeds}, and a "
            f"{PIPELINE_CLASSES[parts.defaults.family]} needs {sprint}; parts of two models."
        )
    for ours, theirs, (name, other) in (
        (transformer.caption_channels, text.hidden_size, ("caption_channels", "the text encoder's hidden_size")),
        (transformer.in_channels, autoencoder.latent_channels, ("in_channels", "the autoencoder's latent_channels")),
    ):
        if ours != theirs:
            raise ValueError(f"{folder}: the transformer's {name}={ours} is not {other}={theirs}; parts of two models.")
    if parts.tokenizer.get_vocab_size() > text.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {parts.tokenizer.get_vocab_size()} tokens and the text encoder embeds "
            f"{text.vocab_size}; parts of two models."
        )
    return parts


def save_pipeline(
    path: str | pathlib.Path,
    *,
    transformer: Part,
    autoencoder: Part,
    text_encoder: Part,
    tokenizer: Tokenizer,
    defaults: SamplingDefaults = SamplingDefaults(),
    dtype: str = "float32",
) -> None:
    """Writes a folder that `load_pipeline` and diffusers' pipeline of the family open; model_index.json last.

    Raises:
      ValueError: as `save_transformer`.
    """
    folder = pathlib.Path(path)
    save_transformer(*transformer, folder / TRANSFORMER.subfolder, dtype)
    save_autoencoder(*autoencoder, folder / AUTOENCODER.subfolder, dtype)
    save_text_encoder(*text_encoder, folder / TEXT_ENCODER.subfolder, dtype)
    tokenizers.save(tokenizer, folder / "tokenizer")
    scheduler = scheduler_to_json(defaults.solver, defaults.solver_order, defaults.flow_shift)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    ours = {k: v for k, v in dataclasses.asdict(defaults).items() if k not in SCHEDULER_FIELDS}
    write_json(folder / "sana_jax.json", ours)
    text_class = text_encoder_weights.config_to_json(text_encoder[0].config)["architectures"][0]
    index = {
        "_class_name": PIPELINE_CLASSES[defaults.family],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", text_class],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "transformer": ["diffusers", TRANSFORMER.class_name],
        "vae": ["diffusers", AUTOENCODER.class_name],
    }
    if defaults.pag_scale > 0:
        index |= pag.index_entries(defaults.pag_layers)
    write_json(folder / "model_index.json", index)


def load_defaults(path: str | pathlib.Path) -> SamplingDefaults:
    """Sampling defaults of a pipeline folder, without loading any weights.

    Raises:
      FileNotFoundError: no scheduler_config.json.
      ValueError: unknown key in sana_jax.json, a scheduler that is not implemented, or not one of the family.
    """
    folder = pipeline_folder(path)
    family = pipeline_family(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    fields = scheduler_from_json(file)
    if (fields["solver"] == "scm") != (family == "sprint"):
        raise ValueError(
            f"{file} is of the solver {fields['solver']}, which the {PIPELINE_CLASSES[family]} of model_index.json "
            "is not sampled with; scm is for SANA-Sprint, and only for it."
        )
    if family == "sprint":
        fields["num_inference_steps"] = 2
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") == pag.CLASS_NAME:
        num_layers = read_json(folder / TRANSFORMER.subfolder / "config.json").get("num_layers", 20)
        try:
            fields |= pag.defaults_from_index(index, num_layers)
        except ValueError as error:
            raise ValueError(f"{folder / 'model_index.json'}: {error}") from error
    file = folder / "sana_jax.json"
    if file.is_file():
        values = read_json(file)
        known = [f.name for f in dataclasses.fields(SamplingDefaults) if f.name not in SCHEDULER_FIELDS]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" (nearest: {near[0]})" if near else ""
                raise ValueError(f"{file} has the unknown key {key!r}{hint}; known are {', '.join(known)}.")
        fields |= values
    if "complex_human_instruction" in fields:
        fields["complex_human_instruction"] = instruction_lines(fields["complex_human_instruction"])
    if "pag_layers" in fields:
        fields["pag_layers"] = tuple(fields["pag_layers"])
    return SamplingDefaults(**fields)


def abstract_params(module: nn.Module) -> dict:
    """Shapes of a module's parameters, nothing computed."""
    kind = next(kind for kind in (TRANSFORMER, AUTOENCODER, TEXT_ENCODER) if isinstance(module, kind.module))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in kind.inputs(module.config)]
    if kind is TEXT_ENCODER:
        inputs = [jax.ShapeDtypeStruct(x.shape, jnp.int32) for x in inputs]
    return jax.eval_shape(functools.partial(module.init, jax.random.key(0)), *inputs)["params"]


def _part_folder(kind: _Kind, path: str | pathlib.Path) -> pathlib.Path:
    root = pathlib.Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder.")
    candidates = [root / kind.subfolder, root / "export" / kind.subfolder, root]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{root} has no config.json in it, in {kind.subfolder}/ or in export/{kind.subfolder}/; give a part's folder, "
        "a pipeline's or a training run's."
    )
