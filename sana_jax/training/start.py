"""What a transformer starts from, or learns from: weights of another model, which has to fit."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array

from sana_jax.models.controlnet import ControlNetConfig
from sana_jax.models.depth import with_depth
from sana_jax.models.layers import BLOCKS
from sana_jax.models.transformer import TransformerConfig
from sana_jax.training import controlnet, lora
from sana_jax.training.settings import IMPLEMENTATIONS, INIT_ADAPTS, is_adapted, model_config
from sana_jax.training.state import PyTree
from sana_jax.weights import folder, native, parts

# Of `folder.SamplingDefaults`: how captions come to the transformer.
TEXT_SETTINGS = ("complex_human_instruction", "lower_case", "null_mask", "max_sequence_length")
_OF_GUIDANCE = ("guidance_embeds", "guidance_embeds_scale")
_COMPUTED = ("dtype", "remat", "unroll", *IMPLEMENTATIONS)  # how a model is computed, and not what
_ADDED = ("qk_norm", "guidance_embeds")  # of INIT_ADAPTS, with parameters of their own


@dataclasses.dataclass(frozen=True)
class Change:
    """How a model differs from the one whose weights it starts from.

    Attributes:
      adapts: fields of INIT_ADAPTS in which it may; see `check_same_model`.
      blocks: numbers of the blocks that it takes over, in order; its further ones are new. (): all there are.
    """

    adapts: Sequence[str] = ()
    blocks: Sequence[int] = ()


def check_start(config, resumed: bool = False) -> None:
    """Raises ValueError where `config.init_from` holds another transformer than `config.model`; reads no weights.

    Or where no LoRA of it has the rank `config.lora.rank`, or there is no ControlNet of it as `config.controlnet` says. A run that is
    `resumed` reads no ControlNet to start from.
    """
    wanted = model_config(TransformerConfig, config.model, config.dtype, "model")
    rank, found = config.lora.rank, parts.find(parts.TRANSFORMER, config.init_from).module
    change = Change(tuple(config.init_adapts), tuple(config.init_blocks))
    check_same_model(wanted, found.config, config.init_from, fixed=is_adapted(config), change=change)
    if rank:
        shapes = folder.abstract_params(found)
        jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes, rank, config.lora.layers))
    if config.controlnet.num_layers:
        branch = controlnet.controlnet_config(config)
        if config.controlnet.init_from and not resumed:
            _check_same_controlnet(branch, controlnet.find(config).module.config, config.controlnet.init_from)


def check_teacher(config) -> None:
    """Raises ValueError where `config.distillation.teacher` is of another model than the student; reads no weights."""
    path = config.distillation.teacher
    found = parts.find(parts.TRANSFORMER, path).module.config
    if found.guidance_embeds:
        raise ValueError(
            f"distillation.teacher={path} is a SANA-Sprint itself, and a teacher takes no guidance scale. Use the flow model that it "
            "was made from, or init_from, to go on from its weights."
        )
    try:
        check_same_model(teacher_config(config), found, path, fixed=True)
    except ValueError as error:
        raise ValueError(
            f"{error} A teacher is config.model without guidance_embeds; to give a model continuous time or norms, adapt it first, as "
            "configs/sana_sprint_1600m_1024_teacher.py does."
        ) from error


def load_start(
    kind,
    load: Callable[..., parts.Part],
    wanted,
    path: str,
    places: PyTree,
    change: Change = Change(),
    init: Callable[[Array], PyTree] | None = None,
    key: Array | None = None,
) -> PyTree:
    """Weights to start from, on the devices; read only once they are known to be of the model `wanted`, a config.

    Args:
      kind, load: `parts.TRANSFORMER` and `folder.load_transformer`, or another part's.
      wanted: the config of the model that they are to start.
      path: `config.init_from`, or the teacher's.
      places: shardings of the parameters.
      change: in what the model at `path` may be another.
      init: key -> all parameters at random, of which those are taken that are not at `path`.
      key: of these and of new blocks.

    Raises:
      FileNotFoundError: there is no such part at `path`.
      ValueError: it is of another model; names the fields.
    """
    found = parts.find(kind, path).module
    check_same_model(wanted, found.config, path, change=change)
    all_places = traverse_util.flatten_dict(places)
    there = {name: all_places[name] for name in traverse_util.flatten_dict(folder.abstract_params(found))}
    there = traverse_util.unflatten_dict(there)
    params = load(path, shardings=there)[1]
    if change.blocks:
        resize = functools.partial(with_depth, kept=change.blocks, num_layers=wanted.num_layers)
        params[BLOCKS] = jax.jit(resize, out_shardings=there[BLOCKS])(params[BLOCKS], key=key)
    params = traverse_util.flatten_dict(params)
    if missing := {name: place for name, place in all_places.items() if name not in params}:

        def born(key):
            found = traverse_util.flatten_dict(init(key))
            return {name: found[name] for name in missing}

        params |= jax.jit(born, out_shardings=missing)(key)
    return traverse_util.unflatten_dict(params)


def teacher_config(config) -> TransformerConfig:
    """That of `config.model` but for the guidance."""
    student = model_config(TransformerConfig, config.model, config.dtype, "model")
    plain = TransformerConfig()
    return dataclasses.replace(student, **{name: getattr(plain, name) for name in _OF_GUIDANCE})


def check_same_model(wanted, found, path: str, fixed: bool = False, change: Change = Change()) -> None:
    """Raises ValueError naming the fields in which the weights at `path` belong to another model than the config's.

    Weights that need the clip of float16 would train and be exported without it. Other fields that change no parameter's
    shape or meaning may differ: how it is computed, the latents' scale, and what a cascade raises from stage to stage
    (grid size, position table). Of a model that is `fixed`, as one with an adapter is, the table may not, nor the grid that it is of.
    Fields in `change.adapts` may differ too, where the wanted model has what the other lacks; with `change.blocks`, of which
    there may be no more than the wanted model has, also how many blocks there are. SANA-Sprints are told the noise level in 0..1
    whatever their `timestep_scale`.
    """
    free = {*_COMPUTED, "scaling_factor", "sample_size", "interpolation_scale", "clamp_fp16"}
    if fixed:
        has_table = getattr(found, "interpolation_scale", None) is not None
        free -= {"interpolation_scale", "sample_size"} if has_table else {"interpolation_scale"}
    if getattr(wanted, "guidance_embeds", False) and found.guidance_embeds:
        free |= {"timestep_scale"}
    if change.blocks:
        _check_blocks(change.blocks, wanted.num_layers, found.num_layers, path)
        free |= {"num_layers"}
    free |= {name for name in change.adapts if name not in _ADDED or getattr(wanted, name)}
    names = _differing(wanted, found, free)
    if names:
        adapt = ""
        if not fixed and all(name in INIT_ADAPTS and (name not in _ADDED or getattr(wanted, name)) for name in names):
            adapt = f", or let the weights adapt with init_adapts={(*change.adapts, *names)!r}"
        if not fixed and names == ["num_layers"] and isinstance(wanted, TransformerConfig):
            adapt = ", or say with init_blocks which of its blocks are taken over"
        raise ValueError(
            f"the weights in {path} are of another model: {_both(wanted, found, names)}. Change config.model{adapt}."
        )
    if getattr(found, "clamp_fp16", False) and not wanted.clamp_fp16:
        raise ValueError(
            f"config.model.clamp_fp16=False, and self-attention of the weights in {path} is clipped to the range of float16. "
            'Use --config.model.clamp_fp16=True, or, if they were not trained in float16, write "clamp_fp16": false into '
            "their config.json."
        )


def _check_same_controlnet(wanted: ControlNetConfig, found: ControlNetConfig, path: str) -> None:
    names = _differing(wanted, found, {*_COMPUTED, *native.SWITCHES, "sample_size", "interpolation_scale"})
    if names == ["wiring"]:
        raise ValueError(
            f"controlnet.wiring={wanted.wiring!r}, and the ControlNet in {path} is connected as {found.wiring!r}. Use "
            f'controlnet.wiring={found.wiring}, or, if it was trained otherwise, write "wiring": "{wanted.wiring}" into its config.json.'
        )
    if names:
        raise ValueError(
            f"the ControlNet in {path} is of another model: {_both(wanted, found, names)}. Use one of this model, and "
            f"controlnet.num_layers={found.num_layers}."
        )


def _differing(wanted, found, free: set[str]) -> list[str]:
    """Names of the fields, but for those that are `free`, in which two configs of a kind differ."""
    names = [field.name for field in dataclasses.fields(wanted) if field.name not in free]
    return [name for name in names if getattr(wanted, name) != getattr(found, name)]


def _both(wanted, found, names: Sequence[str]) -> str:
    return ", ".join(f"{name} (config {getattr(wanted, name)!r}, weights {getattr(found, name)!r})" for name in names)


def _check_blocks(blocks: Sequence[int], wanted: int, found: int, path: str) -> None:
    if max(blocks) >= found:
        raise ValueError(
            f"init_blocks has {max(blocks)}, and the model in {path} has blocks 0 to {found - 1}. Leave out what is not there."
        )
    if len(blocks) > wanted:
        raise ValueError(
            f"init_blocks names {len(blocks)} blocks for model.num_layers={wanted}. Use model.num_layers={len(blocks)}, or more to "
            "add new ones."
        )


def other_settings(path: str, names: Sequence[str], defaults: folder.SamplingDefaults, autoencoder: nn.Module) -> str:
    """In what the pipeline at `path` differs from a run; "" where it does not.

    Args:
      path: of a transformer alone, or of a pipeline that is not all there, nothing is known.
      names: the settings that are compared.
      defaults, autoencoder: of the run.
    """
    if pathlib.Path(path).is_file():
        return ""
    try:
        base, latents = folder.load_defaults(path), parts.find(parts.AUTOENCODER, path).module.config
    except FileNotFoundError:
        return ""
    differing = [
        f"{name} {getattr(base, name)!r} -> {getattr(defaults, name)!r}"
        for name in names
        if getattr(base, name) != getattr(defaults, name)
    ]
    if dataclasses.replace(latents, dtype=autoencoder.config.dtype) != autoencoder.config:
        differing.append("another autoencoder")
    return "; ".join(differing)
