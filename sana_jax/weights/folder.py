"""Pipeline folders in the diffusers layout, read and written; for each part alone see `parts`.

FOLDER/model_index.json                     written last: a folder without it is not complete
       transformer/   config.json, diffusion_pytorch_model.safetensors
       vae/           the same
       controlnet/    the same, where there is one
       text_encoder/  config.json, model.safetensors
       tokenizer/     tokenizer.json
       scheduler/     scheduler_config.json: solver and flow shift
       sana_jax.json  ours: the other sampling defaults; absent from public folders
"""

import dataclasses
import difflib
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from tokenizers import Tokenizer

from sana_jax import atomic
from sana_jax import tokenizer as tokenizers
from sana_jax.prompts import COMPLEX_HUMAN_INSTRUCTION, INSTRUCTIONS, MAX_SEQUENCE_LENGTH, instruction_lines
from sana_jax.weights import controlnet_files, pag, parts, setting_rules
from sana_jax.weights.lora import Lora
from sana_jax.weights.model_index import CONTROLNET_CLASS, has_controlnet, pipeline_family, pipeline_folder, read_json
from sana_jax.weights.parts import (
    AUTOENCODER,
    CONTROLNET,
    TEXT_ENCODER,
    TRANSFORMER,
    Part,
    Source,
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
from sana_jax.weights.scheduler import check_scheduler, scheduler_from_json, scheduler_to_json
from sana_jax.weights.tensor_files import check_dtype, write_json

__all__ = [
    "PipelineParts",
    "SamplingDefaults",
    "abstract_params",
    "check_replaceable",
    "find_pipeline",
    "load_autoencoder",
    "load_defaults",
    "load_text_encoder",
    "load_transformer",
    "read_pipeline",
    "save_autoencoder",
    "save_pipeline",
    "save_text_encoder",
    "save_transformer",
]


NULL_MASKS = ("own", "prompt")


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """How a model is sampled unless the call says otherwise. The defaults are those of the public SANA models.

    Attributes:
      complex_human_instruction: lines put before every prompt; None for none.
      lower_case: whether prompts are lower-cased, as in diffusers; the original code leaves them as they are.
      null_mask: which tokens of the null (or negative) text the guidance's second branch sees: "own", those the text has,
        as in diffusers; or "prompt", as many as the prompt has, which is what the original code samples with, and trains
        with (a dropped caption leaves its mask behind). The two give different pictures.
      max_sequence_length: text features per prompt.
      height, width: of the picture; None: what the transformer was trained at.
      num_inference_steps, guidance_scale: see `SanaPipeline.__call__`.
      solver: "flow_dpm" or "flow_euler"; "scm" says that the model is a SANA-Sprint, which is sampled in no other way.
      solver_order: of flow_dpm.
      flow_shift: 3.0 up to 2K, 6.0 at 4K.
      integer_timesteps: whether a transformer with `TransformerConfig.integer_timesteps` is sampled with them too, as it
        was trained and as the original code samples. diffusers leaves that to the scheduler: DPM's timesteps are
        integers, Euler's are not. So a folder with an Euler scheduler has False here unless its sana_jax.json says
        otherwise.
      pag_scale, pag_adaptive_scale, pag_layers: perturbed attention guidance; a scale of 0 is none.
    """

    complex_human_instruction: tuple[str, ...] | None = COMPLEX_HUMAN_INSTRUCTION
    lower_case: bool = True
    null_mask: str = "own"
    max_sequence_length: int = MAX_SEQUENCE_LENGTH
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 20
    guidance_scale: float = 4.5
    solver: str = "flow_dpm"
    solver_order: int = 2
    flow_shift: float = 3.0
    integer_timesteps: bool = True
    pag_scale: float = 0.0
    pag_adaptive_scale: float = 0.0
    pag_layers: tuple[int, ...] = (0,)

    @property
    def family(self) -> str:
        """Either "sana" or "sprint"."""
        return "sprint" if self.solver == "scm" else "sana"


# What sana_jax.json may hold: the fields above, but for solver, solver_order and flow_shift of scheduler_config.json.
OWN_RULES = {
    "complex_human_instruction": setting_rules.either(
        setting_rules.list_of(setting_rules.TEXT), setting_rules.one_of(*INSTRUCTIONS), setting_rules.NULL
    ),
    "lower_case": setting_rules.FLAG,
    "null_mask": setting_rules.one_of(*NULL_MASKS),
    "max_sequence_length": setting_rules.whole_number(2, MAX_SEQUENCE_LENGTH),
    "height": setting_rules.SIDE,
    "width": setting_rules.SIDE,
    "num_inference_steps": setting_rules.whole_number(1, 20),
    "guidance_scale": setting_rules.number(4.5),
    "integer_timesteps": setting_rules.FLAG,
    "pag_scale": setting_rules.number(3.0),
    "pag_adaptive_scale": setting_rules.number(0.0),
    "pag_layers": setting_rules.list_of(setting_rules.whole_number(0, 0), least=1),
}


# What `save_pipeline` makes in a folder; without model_index.json, of a save that was killed.
_OWN_NAMES = {
    *(kind.subfolder for kind in (TRANSFORMER, AUTOENCODER, TEXT_ENCODER, CONTROLNET)),
    *("tokenizer", "scheduler", "sana_jax.json", "model_index.json", atomic.UNFINISHED),
}
PIPELINE_CLASSES = {"sana": "SanaPipeline", "sprint": "SanaSprintPipeline"}  # what diffusers calls the families


class PipelineParts(NamedTuple):
    """What a pipeline folder holds."""

    transformer: Part
    autoencoder: Part
    text_encoder: Part
    tokenizer: Tokenizer
    defaults: SamplingDefaults
    controlnet: Part | None = None


class FoundPipeline(NamedTuple):
    """A pipeline folder whose files are there and fit each other; no weights are read."""

    transformer: Source
    autoencoder: Source
    text_encoder: Source
    tokenizer: Tokenizer
    defaults: SamplingDefaults
    controlnet: Source | None = None


def find_pipeline(
    path: str | pathlib.Path,
    *,
    clamp_fp16: bool | None = None,
    lora: Lora | None = None,
    lora_scale: float = 1.0,
    controlnet: str | pathlib.Path | Literal[False] | None = None,
    controlnet_wiring: str | None = None,
) -> FoundPipeline:
    """A pipeline folder with the names and shapes of its tensors compared and its parts checked to fit each other.

    Args:
      path: the folder, or a training run's with `export/` inside.
      clamp_fp16: of the transformer; as `load_transformer`.
      lora, lora_scale: added to the transformer's weights, see `weights.lora`.
      controlnet: its folder, a folder with controlnet/ inside, or a file of the original code. None: the pipeline's own, if any.
        False: none.
      controlnet_wiring: see `ControlNetConfig`; None: as the ControlNet's own config.json says, else "diffusers"; of a file of the
        original code "original".

    Raises:
      FileNotFoundError: a folder or file is missing; names it.
      ValueError: a part is damaged, of a kind not implemented, or does not fit another one.
    """
    folder = pipeline_folder(path)
    tokenizer, defaults = tokenizers.load(folder), load_defaults(folder)
    configs = [read_config(kind, folder) for kind in (TRANSFORMER, AUTOENCODER, TEXT_ENCODER)]
    _check_fit(folder, *configs, tokenizer, defaults.family)
    found = FoundPipeline(
        transformer=parts.find(TRANSFORMER, folder, clamp_fp16=clamp_fp16),
        autoencoder=parts.find(AUTOENCODER, folder),
        text_encoder=parts.find(TEXT_ENCODER, folder),
        tokenizer=tokenizer,
        defaults=defaults,
    )
    for source in found[:3]:
        parts.check(source)
    if lora is not None:
        found = found._replace(transformer=parts.with_lora(found.transformer, lora, lora_scale))
    if controlnet is None and has_controlnet(folder):
        controlnet = folder
    if controlnet is None or controlnet is False:
        if controlnet_wiring is not None:
            raise ValueError(
                f"controlnet_wiring={controlnet_wiring!r} is given and no controlnet; it says how one is connected."
            )
        return found
    base = found.transformer.module.config
    return found._replace(controlnet=controlnet_files.find(controlnet, base, controlnet_wiring))


def read_pipeline(
    found: FoundPipeline,
    dtype: str = "float32",
    *,
    shardings: Mapping[str, Shardings] | Shardings | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache_dir: str | pathlib.Path | None = None,
) -> PipelineParts:
    """The parts with their weights.

    Args:
      found: as `find_pipeline` gives it.
      dtype, progress, cache_dir: as `load_transformer`, for each of the parts.
      shardings: as `load_transformer`: one function for all parts, or {"transformer": ..., "autoencoder": ...,
        "text_encoder": ..., "controlnet": ...} (a part that is left out stays in NumPy arrays).

    Raises:
      ValueError: a file is damaged.
    """

    def read(part: str) -> Part:
        places = shardings.get(part) if isinstance(shardings, Mapping) else shardings
        return parts.read(getattr(found, part), dtype, shardings=places, progress=progress, cache_dir=cache_dir)

    return PipelineParts(
        transformer=read("transformer"),
        autoencoder=read("autoencoder"),
        text_encoder=read("text_encoder"),
        tokenizer=found.tokenizer,
        defaults=found.defaults,
        controlnet=None if found.controlnet is None else read("controlnet"),
    )


def _check_fit(folder: pathlib.Path, transformer, autoencoder, text, tokenizer: Tokenizer, family: str) -> None:
    if transformer.guidance_embeds != (family == "sprint"):
        raise ValueError(
            f"{folder}: the transformer has guidance_embeds={transformer.guidance_embeds}, and a "
            f"{PIPELINE_CLASSES[family]} needs {family == 'sprint'}; parts of two models."
        )
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
    transformer: Part | pathlib.Path,
    autoencoder: Part | pathlib.Path,
    text_encoder: Part | pathlib.Path,
    tokenizer: Tokenizer,
    defaults: SamplingDefaults = SamplingDefaults(),
    dtype: str = "float32",
    controlnet: Part | None = None,
) -> None:
    """Writes a folder that `find_pipeline` and diffusers' pipeline of the family open.

    All is written beside the files of a model that is there, and then takes their place: a save that fails leaves them as
    they were, and one that is killed while they are exchanged leaves a folder without model_index.json, which nobody opens.

    Args:
      path: the folder; made where it does not exist. Other files in it are kept.
      transformer, autoencoder, text_encoder: as `load_transformer` and its like give them; or another pipeline folder
        that was written in `dtype`, whose part is linked, as it is there (`atomic.link_folder`).
      tokenizer, defaults: as in `PipelineParts`.
      dtype: as `save_transformer`.
      controlnet: of a pipeline that has one; its folder is then diffusers' SanaControlNetPipeline.

    Raises:
      ValueError: as `save_transformer`; a default that `load_defaults` would refuse; or `path` holds files and no model.
        The folder is as it was then.
    """
    folder = pathlib.Path(path).resolve()
    check_dtype(dtype)
    check_replaceable(folder)
    own = {key: getattr(defaults, key) for key in OWN_RULES}
    setting_rules.check(folder / "sana_jax.json", own, OWN_RULES)
    scheduler = scheduler_to_json(defaults.solver, defaults.solver_order, defaults.flow_shift)
    check_scheduler(folder / "scheduler" / "scheduler_config.json", scheduler)
    had_controlnet = (folder / "model_index.json").is_file() and has_controlnet(folder)
    with atomic.new_entries(folder, last="model_index.json") as new:
        given = [(TRANSFORMER, transformer), (AUTOENCODER, autoencoder), (TEXT_ENCODER, text_encoder)]
        if controlnet is not None:
            given.append((CONTROLNET, controlnet))
        for kind, part in given:
            if isinstance(part, pathlib.Path):
                atomic.link_folder(part / kind.subfolder, new / kind.subfolder)
            else:
                parts.save(kind, *part, new / kind.subfolder, dtype, home=folder / kind.subfolder)
        tokenizers.save(tokenizer, new / "tokenizer")
        (new / "scheduler").mkdir()
        write_json(new / "scheduler" / "scheduler_config.json", scheduler)
        write_json(new / "sana_jax.json", own)
        text_class = read_json(new / TEXT_ENCODER.subfolder / "config.json")["architectures"][0]
        index = _index(defaults, scheduler["_class_name"], text_class)
        if controlnet is not None:
            index |= {"_class_name": CONTROLNET_CLASS, "controlnet": ["diffusers", CONTROLNET.class_name]}
        write_json(new / "model_index.json", index)
    if had_controlnet and controlnet is None:
        shutil.rmtree(folder / CONTROLNET.subfolder, ignore_errors=True)


def check_replaceable(folder: pathlib.Path) -> None:
    """Raises ValueError where a model cannot be written to this folder: it is a file, or holds others than a model's."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and a model is a folder; give another path.")
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return
    foreign = [item.name for item in folder.iterdir() if item.name not in _OWN_NAMES]
    if foreign:
        raise ValueError(
            f"{folder} holds {', '.join(sorted(foreign)[:3])} and no model (model_index.json); give a new or an empty folder, "
            "or one with a model to replace."
        )


def _index(defaults: SamplingDefaults, scheduler_class: str, text_class: str) -> dict:
    """What is in model_index.json."""
    index = {
        "_class_name": PIPELINE_CLASSES[defaults.family],
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": ["transformers", text_class],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "transformer": ["diffusers", TRANSFORMER.class_name],
        "vae": ["diffusers", AUTOENCODER.class_name],
    }
    if defaults.pag_scale > 0:
        index |= pag.index_entries(defaults.pag_layers)
    return index


def load_defaults(path: str | pathlib.Path) -> SamplingDefaults:
    """Sampling defaults of a pipeline folder, without loading any weights.

    Raises:
      FileNotFoundError: no scheduler_config.json.
      ValueError: an unknown key in sana_jax.json, a value of another kind or out of range there or in
        scheduler_config.json, a scheduler that is not implemented, or not one of the family.
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
        for key in values:
            if key not in OWN_RULES:
                near = difflib.get_close_matches(key, OWN_RULES, n=1)
                hint = f" (nearest: {near[0]})" if near else ""
                raise ValueError(f"{file} has the unknown key {key!r}{hint}; known are {', '.join(OWN_RULES)}.")
        setting_rules.check(file, values, OWN_RULES)
        fields |= values
    if "complex_human_instruction" in fields:
        fields["complex_human_instruction"] = instruction_lines(fields["complex_human_instruction"])
    if "pag_layers" in fields:
        fields["pag_layers"] = tuple(fields["pag_layers"])
    return SamplingDefaults(**fields)
