"""Pipeline folders in the diffusers layout, read and written; for each part alone see `parts`.

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
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tokenizers import Tokenizer

from sana_jax import tokenizer as tokenizers
from sana_jax.prompts import COMPLEX_HUMAN_INSTRUCTION, MAX_SEQUENCE_LENGTH
from sana_jax.weights import text_encoder as text_encoder_weights
from sana_jax.weights.model_index import pipeline_folder, read_json
from sana_jax.weights.parts import (
    AUTOENCODER,
    TEXT_ENCODER,
    TRANSFORMER,
    Part,
    abstract_params,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    read_config,
    save_autoencoder,
    save_text_encoder,
    save_transformer,
)
from sana_jax.weights.placement import Shardings
from sana_jax.weights.tensor_files import write_json

__all__ = [
    "PipelineParts",
    "SamplingDefaults",
    "abstract_params",
    "load_autoencoder",
    "load_defaults",
    "load_pipeline",
    "load_text_encoder",
    "load_transformer",
    "save_autoencoder",
    "save_pipeline",
    "save_text_encoder",
    "save_transformer",
]


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """How a model is sampled unless the call says otherwise. The defaults are those of the public SANA models.

    Attributes:
      complex_human_instruction: lines put before every prompt; None for none.
      max_sequence_length: text features per prompt.
      height, width: of the picture; None: what the transformer was trained at.
      num_inference_steps, guidance_scale: see `SanaPipeline.__call__`.
      solver: "flow_dpm" or "flow_euler".
      solver_order: of flow_dpm.
      flow_shift: 3.0 up to 2K, 6.0 at 4K.
    """

    complex_human_instruction: tuple[str, ...] | None = COMPLEX_HUMAN_INSTRUCTION
    max_sequence_length: int = MAX_SEQUENCE_LENGTH
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 20
    guidance_scale: float = 4.5
    solver: str = "flow_dpm"
    solver_order: int = 2
    flow_shift: float = 3.0


SCHEDULER_FIELDS = (
    "solver",
    "solver_order",
    "flow_shift",
)  # kept in scheduler_config.json, the others in sana_jax.json


class PipelineParts(NamedTuple):
    """What a pipeline folder holds."""

    transformer: Part
    autoencoder: Part
    text_encoder: Part
    tokenizer: Tokenizer
    defaults: SamplingDefaults


def load_pipeline(
    path: str | pathlib.Path,
    dtype: str = "float32",
    *,
    shardings: Mapping[str, Shardings] | Shardings | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache_dir: str | pathlib.Path | None = None,
) -> PipelineParts:
    """All parts of a pipeline folder, checked to fit each other before any weights are read.

    Args:
      path: the folder, or a training run's with `export/` inside.
      dtype, progress, cache_dir: as `load_transformer`, for each of the parts.
      shardings: as `load_transformer`: one function for all parts, or {"transformer": ..., "autoencoder": ...,
        "text_encoder": ...} (a part that is left out stays in NumPy arrays).

    Raises:
      FileNotFoundError: a folder or file is missing; names it.
      ValueError: a part is damaged, of a kind not implemented, or does not fit another one.
    """
    folder = pipeline_folder(path)
    tokenizer, defaults = tokenizers.load(folder), load_defaults(folder)
    configs = [read_config(kind, folder) for kind in (TRANSFORMER, AUTOENCODER, TEXT_ENCODER)]
    _check_fit(folder, *configs, tokenizer)
    kwargs = dict(progress=progress, cache_dir=cache_dir)

    def places(part):
        return shardings.get(part) if isinstance(shardings, Mapping) else shardings

    return PipelineParts(
        transformer=load_transformer(folder, dtype, shardings=places("transformer"), **kwargs),
        autoencoder=load_autoencoder(folder, dtype, shardings=places("autoencoder"), **kwargs),
        text_encoder=load_text_encoder(folder, dtype, shardings=places("text_encoder"), **kwargs),
        tokenizer=tokenizer,
        defaults=defaults,
    )


def _check_fit(folder: pathlib.Path, transformer, autoencoder, text, tokenizer: Tokenizer) -> None:
    for ours, theirs, (name, other) in (
        (transformer.caption_channels, text.hidden_size, ("caption_channels", "the text encoder's hidden_size")),
        (transformer.in_channels, autoencoder.latent_channels, ("in_channels", "the autoencoder's latent_channels")),
    ):
        if ours != theirs:
            raise ValueError(f"{folder}: the transformer's {name}={ours} is not {other}={theirs}; parts of two models.")
    if tokenizer.get_vocab_size() > text.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens and the text encoder embeds "
            f"{text.vocab_size}; parts of two models."
        )


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
    """Writes a folder that `load_pipeline` and diffusers' SanaPipeline open; model_index.json last.

    Raises:
      ValueError: as `save_transformer`.
    """
    folder = pathlib.Path(path)
    save_transformer(*transformer, folder / TRANSFORMER.subfolder, dtype)
    save_autoencoder(*autoencoder, folder / AUTOENCODER.subfolder, dtype)
    save_text_encoder(*text_encoder, folder / TEXT_ENCODER.subfolder, dtype)
    tokenizers.save(tokenizer, folder / "tokenizer")
    scheduler = _scheduler_to_json(defaults)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    ours = {k: v for k, v in dataclasses.asdict(defaults).items() if k not in SCHEDULER_FIELDS}
    write_json(folder / "sana_jax.json", ours)
    text_class = text_encoder_weights.config_to_json(text_encoder[0].config)["architectures"][0]
    index = {
        "_class_name": "SanaPipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", text_class],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "transformer": ["diffusers", TRANSFORMER.class_name],
        "vae": ["diffusers", AUTOENCODER.class_name],
    }
    write_json(folder / "model_index.json", index)


def load_defaults(path: str | pathlib.Path) -> SamplingDefaults:
    """Sampling defaults of a pipeline folder, without loading any weights.

    Raises:
      FileNotFoundError: no scheduler_config.json.
      ValueError: unknown key in sana_jax.json, or a scheduler that is not implemented.
    """
    folder = pipeline_folder(path)
    fields = _scheduler_from_json(folder / "scheduler" / "scheduler_config.json")
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
    if fields.get("complex_human_instruction") is not None:
        fields["complex_human_instruction"] = tuple(fields["complex_human_instruction"])
    return SamplingDefaults(**fields)


# What a diffusers scheduler must say to be one of our solvers; the other keys do not bear on flow models.
_DPM_FIXED = {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "final_sigmas_type": "zero",
    "num_train_timesteps": 1000,
    "lower_order_final": True,
    "euler_at_final": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_dynamic_shifting": False,
}
_DPM_REQUIRED = ("prediction_type", "use_flow_sigmas")  # diffusers' own defaults are another solver's
_EULER_FIXED = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}


def _scheduler_to_json(defaults: SamplingDefaults) -> dict:
    if defaults.solver == "flow_euler":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", **_EULER_FIXED, "shift": defaults.flow_shift}
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        **_DPM_FIXED,
        "solver_order": defaults.solver_order,
        "flow_shift": defaults.flow_shift,
    }


def _scheduler_from_json(file: pathlib.Path) -> dict:
    values = read_json(file)
    name = values.get("_class_name")
    if name == "DPMSolverMultistepScheduler":
        fixed = _DPM_FIXED
        fields = {
            "solver": "flow_dpm",
            "solver_order": values.get("solver_order", 2),
            "flow_shift": values.get("flow_shift", 1.0),
        }
        values = {key: None for key in _DPM_REQUIRED} | values
    elif name == "FlowMatchEulerDiscreteScheduler":
        fixed = _EULER_FIXED
        fields = {"solver": "flow_euler", "flow_shift": values.get("shift", 1.0)}
    else:
        raise ValueError(
            f"{file} asks for the scheduler {name}; implemented are DPMSolverMultistepScheduler and "
            "FlowMatchEulerDiscreteScheduler."
        )
    for key, wanted in fixed.items():
        if key in values and values[key] != wanted:
            raise ValueError(f"{file} has {key}={values[key]!r}; the solvers here implement {wanted!r} only.")
    return fields
