"""What the fields of a config may say: ranges of numbers, fields that nothing would read, fields that exclude each other."""

import functools
import math
import operator
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from sana_jax.models.controlnet import WIRINGS
from sana_jax.prompts import INSTRUCTIONS
from sana_jax.training import lora
from sana_jax.training.profiling import check_window
from sana_jax.training.settings import INIT_ADAPTS, is_adapted, loader_config, nearest
from sana_jax.weights.folder import NULL_MASKS
from sana_jax.weights.tensor_files import STORED_DTYPES

# Field -> lowest and highest value; an infinite one is never of use.
_RANGES = {
    "seed": (0, 2**32 - 1),
    "perceptual_weight": (0, math.inf),
    "gan.weight": (0, math.inf),
    "gan.start_step": (0, math.inf),
    "gan.width": (1, math.inf),
    "gan.depth": (1, math.inf),
    "text_encoder.max_length": (2, math.inf),
    "lora.rank": (0, math.inf),
    "controlnet.num_layers": (0, math.inf),
    "distillation.angle_mean": (-10, 10),
    "distillation.tangent_warmup": (0, math.inf),
    "distillation.adversarial_weight": (0, math.inf),
    "distillation.critic_angle_mean": (-10, 10),
    "distillation.pure_noise_share": (0, 1),
    "train.num_steps": (0, math.inf),
    "train.class_dropout_prob": (0, 1),
    "train.logit_mean": (-10, 10),  # there all levels are the first, or the last
    "train.skip_nonfinite": (0, math.inf),
    "train.log_every": (1, math.inf),
    "train.sample_every": (0, math.inf),
    "train.checkpoint_every": (1, math.inf),
    "train.keep_checkpoints": (1, math.inf),
    "train.keep_every": (0, math.inf),
    "optimizer.learning_rate": (0, math.inf),
    "optimizer.warmup_steps": (0, math.inf),
    "optimizer.final_fraction": (0, 1),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.grad_clip_norm": (0, math.inf),
    "ema.decay": (0, 1),
    "sample.num_images": (1, math.inf),
    "sample.num_inference_steps": (1, math.inf),
    "sample.guidance_scale": (0, math.inf),
}
# Fields that are divided by, or a factor of all that is learnt.
_POSITIVE = (
    "train.flow_shift",
    "train.logit_std",
    "lora.scale",
    "distillation.angle_std",
    "distillation.critic_angle_std",
    "optimizer.adamw_eps",
    "optimizer.came_clip",
    "optimizer.muon_rms",
)
# Fields that only the other task or mode reads -> their defaults in configs/base.py.
_OF_AUTOENCODER = {
    "reconstruction": "l1",
    "perceptual_weight": 0.0,
    "perceptual": "efficientnet",
    "lpips_vgg": "",
    "lpips_heads": "",
    "freeze_encoder": False,
    "latent_noise": 0.0,
    "gan.weight": 0.0,
    "gan.start_step": 0,
    "gan.width": 64,
    "gan.depth": 3,
}
_OF_TRANSFORMER = {
    "autoencoder_path": "",
    "autoencoder_dtype": "float32",
    "text_encoder.mode": "train",
    "text_encoder.path": "",
    "text_encoder.tokenizer": "",
    "text_encoder.use_instruction": False,
    "lora.rank": 0,
    "controlnet.num_layers": 0,
    "distillation.teacher": "",
    "init_adapts": (),
    "init_blocks": (),
    "train.class_dropout_prob": 0.1,
    "train.flow_shift": 3.0,
    "train.logit_mean": 0.0,
    "train.logit_std": 1.0,
    "train.cache_latents": False,
    "sample.prompts": (),
}
# Fields of flow matching, which a distillation does not read, and of the latter.
_OF_FLOW_MATCHING = ("train.class_dropout_prob", "train.flow_shift", "train.logit_mean", "train.logit_std")
_OF_DISTILLATION = {
    "distillation.guidance_scales": (4.0, 4.5, 5.0),
    "distillation.angle_mean": 0.2,
    "distillation.angle_std": 1.6,
    "distillation.tangent_warmup": 4000,
    "distillation.adversarial_weight": 0.5,
}
_OF_CRITIC = {
    "distillation.critic_blocks": (2, 8, 14, 19),
    "distillation.critic_angle_mean": -0.6,
    "distillation.critic_angle_std": 1.0,
    "distillation.pure_noise_share": 0.5,
}
# Fields that only a weight above 0 makes read.
_OF_PERCEPTUAL_LOSS = {name: _OF_AUTOENCODER[name] for name in ("perceptual", "lpips_vgg", "lpips_heads")}
_OF_DISCRIMINATOR = {name: _OF_AUTOENCODER[name] for name in ("gan.start_step", "gan.width", "gan.depth")}
_UNREAD = {"transformer": _OF_AUTOENCODER, "autoencoder": _OF_TRANSFORMER}


def check_ranges(config: ConfigDict) -> None:
    """Raises ValueError for the first value of a run's config that would be of no use, or only once it is reached."""
    for name, (lowest, highest) in _RANGES.items():
        value = _field(config, name)
        if not (lowest <= value <= highest and math.isfinite(value)):
            rule = f"{lowest} or more, but not inf" if highest == math.inf else f"from {lowest} to {highest}"
            raise ValueError(f"{name}={value}: use {rule}.")
    for name in _POSITIVE:
        value = _field(config, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: use more than 0, but not inf.")
    for prompt in config.sample.prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"sample.prompts has {prompt!r}, which is no text. Use ('a red fox', 'a lighthouse').")
    if config.dtype == "float16":
        raise ValueError(
            "dtype='float16' holds no gradient below 6e-8, and losses are not scaled. Use bfloat16 or float32."
        )
    text, train = config.text_encoder, config.train
    for name, known in (("null_mask", NULL_MASKS), ("instruction", INSTRUCTIONS)):
        if text[name] not in known:
            raise ValueError(f"text_encoder.{name}={text[name]!r} is not one of {', '.join(known)}.")
    _check_unread(config, _UNREAD.get(config.task, {}), f"task={config.task!r}")
    if not config.perceptual_weight:
        _check_unread(config, _OF_PERCEPTUAL_LOSS, "perceptual_weight=0")
    if not config.gan.weight:
        _check_unread(config, _OF_DISCRIMINATOR, "gan.weight=0")
    if not text.use_instruction:
        _check_unread(config, {"text_encoder.instruction": "diffusers"}, "text_encoder.use_instruction=False")
    if len(config.sample.prompts) > config.sample.num_images:
        raise ValueError(
            f"sample.prompts has {len(config.sample.prompts)} texts for sample.num_images={config.sample.num_images} pictures. "
            f"Use sample.num_images={len(config.sample.prompts)} or more."
        )
    if config.task == "autoencoder" and config.mesh.seq > 1:
        raise ValueError(
            f"mesh.seq={config.mesh.seq} splits nothing when an autoencoder is trained. Use mesh.seq=1 and mesh.data."
        )
    if config.task == "transformer":
        unread = {"train": {"text_encoder.path": ""}, "frozen": {"text_encoder.tokenizer": ""}}
        _check_unread(config, unread.get(text.mode, {}), f"text_encoder.mode={text.mode!r}")
    if config.task == "transformer" and text.mode == "frozen" and not text.path:
        raise ValueError(
            "text_encoder.mode='frozen' and text_encoder.path=''. Use text_encoder.path=FOLDER, a pipeline with "
            "text_encoder/ and tokenizer/, or text_encoder.mode='train'."
        )
    _check_start(config)
    _check_lora(config)
    _check_controlnet(config)
    _check_distillation(config)
    if train.export_dtype not in STORED_DTYPES:
        raise ValueError(f"train.export_dtype={train.export_dtype!r} is not one of {', '.join(STORED_DTYPES)}.")
    if train.keep_every % train.checkpoint_every:
        nearest_every = max(1, round(train.keep_every / train.checkpoint_every)) * train.checkpoint_every
        raise ValueError(
            f"train.keep_every={train.keep_every} is not a multiple of train.checkpoint_every={train.checkpoint_every}, "
            f"so that there is nothing to keep; use {nearest_every}"
        )
    check_window(train.profile_steps)
    loader_config(config.data)  # which raises for what cannot be loaded


def _check_lora(config: ConfigDict) -> None:
    rank, layers = config.lora.rank, config.lora.layers
    if not rank:
        return _check_unread(config, {"lora.scale": 1.0, "lora.layers": lora.ATTENTIONS}, "lora.rank=0")
    _check_adapted(config, f"lora.rank={rank}", "a LoRA")
    if config.optimizer.name not in lora.OPTIMIZERS:
        raise ValueError(
            f"optimizer.name={config.optimizer.name!r} does nothing of its own for a LoRA. Use {' or '.join(lora.OPTIMIZERS)}."
        )
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(
            f"lora.layers={tuple(layers)!r}: name one layer or more, each once, of {', '.join(lora.LAYERS)}."
        )
    for name in layers:
        if name not in lora.LAYERS:
            raise ValueError(
                f"lora.layers has {name!r}, which is none of {', '.join(lora.LAYERS)}{nearest(str(name), lora.LAYERS)}"
            )


def _check_controlnet(config: ConfigDict) -> None:
    section = config.controlnet
    if not section.num_layers:
        return _check_unread(
            config, {"controlnet.wiring": "diffusers", "controlnet.init_from": ""}, "controlnet.num_layers=0"
        )
    reader = f"controlnet.num_layers={section.num_layers}"
    if config.lora.rank:
        raise ValueError(f"{reader} trains a ControlNet, and lora.rank={config.lora.rank} a LoRA. Use one of them.")
    _check_adapted(config, reader, "a ControlNet")
    if section.wiring not in WIRINGS:
        raise ValueError(f"controlnet.wiring={section.wiring!r} is not one of {', '.join(WIRINGS)}.")


def _check_adapted(config: ConfigDict, reader: str, what: str) -> None:
    """Of the model whose adapter `what` trains, because of the field `reader`."""
    if config.model.get("guidance_embeds"):
        raise ValueError(
            f"{reader}: {what} is trained by flow matching, and model.guidance_embeds=True is of a SANA-Sprint. Train it of the model "
            "that the Sprint was made from."
        )
    if not config.init_from:
        raise ValueError(
            f"{reader} changes a model that is there. Use init_from=FOLDER, the transformer's or a pipeline's."
        )
    if config.text_encoder.mode != "frozen":
        raise ValueError(
            f"{reader} trains the transformer alone, and text_encoder.mode={config.text_encoder.mode!r}. Use "
            "text_encoder.mode='frozen' and text_encoder.path=FOLDER, a pipeline's, as a rule that of init_from."
        )


def _check_start(config: ConfigDict) -> None:
    for name in config.init_adapts:
        if name not in INIT_ADAPTS:
            raise ValueError(
                f"init_adapts has {name!r}, which is none of {', '.join(INIT_ADAPTS)}{nearest(str(name), INIT_ADAPTS)}"
            )
    blocks = tuple(config.init_blocks)
    if not all(type(block) is int and block >= 0 for block in blocks):
        raise ValueError(
            f"init_blocks={blocks!r}: give the numbers, from 0, of the blocks that are taken over, as (0, 1, 2), or () for all."
        )
    for name, value in (("init_adapts", tuple(config.init_adapts)), ("init_blocks", blocks)):
        if value and (is_adapted(config) or not config.init_from):
            raise ValueError(f"{name}={value!r} is of a transformer that trains from the weights at init_from. Use ().")


def _check_distillation(config: ConfigDict) -> None:
    section, model = config.distillation, config.model
    if not section.teacher:
        _check_unread(config, _OF_DISTILLATION | _OF_CRITIC, "distillation.teacher=''")
        if config.task == "transformer" and model.get("guidance_embeds"):
            raise ValueError(
                "model.guidance_embeds=True is of SANA-Sprint, which learns its guidance from a teacher. Use "
                "distillation.teacher=FOLDER, or model.guidance_embeds=False."
            )
        return
    reader = f"distillation.teacher={section.teacher!r}"
    _check_unread(config, {name: _OF_TRANSFORMER[name] for name in _OF_FLOW_MATCHING}, reader)
    for name, what in (("lora.rank", "a LoRA"), ("controlnet.num_layers", "a ControlNet")):
        if value := _field(config, name):
            raise ValueError(f"{reader} trains a whole student, and {name}={value} {what}. Use one of them.")
    if config.text_encoder.mode != "frozen":
        raise ValueError(
            f"{reader} has learnt the features of its own text encoder, and text_encoder.mode={config.text_encoder.mode!r}. Use "
            "text_encoder.mode='frozen' and text_encoder.path=FOLDER, a pipeline's, as a rule that of the teacher."
        )
    wanted = {"guidance_embeds": True, "integer_timesteps": False, "timestep_scale": 0.001}
    if any(model.get(name) != value for name, value in wanted.items()):
        raise ValueError(
            f"{reader} makes a student that takes a guidance scale and is differentiated in the noise level, which it embeds as a "
            f"number in 0..1. Use {', '.join(f'model.{name}={value}' for name, value in wanted.items())}, as presets.sprint_600m and "
            "sprint_1600m have."
        )
    scales = section.guidance_scales
    if not scales or not all(isinstance(scale, float | int) and 0 <= scale < math.inf for scale in scales):
        raise ValueError(
            f"distillation.guidance_scales={tuple(scales)!r}: give one number or more, as (4.0, 4.5, 5.0)."
        )
    if not section.adversarial_weight:
        return _check_unread(config, _OF_CRITIC, "distillation.adversarial_weight=0")
    blocks, count = tuple(section.critic_blocks), model.num_layers
    if (
        not blocks
        or len(set(blocks)) < len(blocks)
        or not all(type(block) is int and 0 <= block < count for block in blocks)
    ):
        raise ValueError(
            f"distillation.critic_blocks={blocks!r}: name one block or more of the teacher, each once, of 0 to {count - 1}, or use "
            "distillation.adversarial_weight=0."
        )
    if config.mesh.seq > 1:
        raise ValueError(
            f"mesh.seq={config.mesh.seq}: the critic's convolutions need all tokens of a picture on a device. Use mesh.seq=1, or "
            "distillation.adversarial_weight=0."
        )


def _check_unread(config: ConfigDict, defaults: Mapping[str, Any], reader: str) -> None:
    for name, default in defaults.items():
        value = _field(config, name)
        if value != default:
            raise ValueError(f"{name}={value!r} is not read with {reader}. Leave it at {default!r}.")


def _field(config: ConfigDict, name: str):
    """The value of "SECTION.FIELD" or "FIELD"."""
    return functools.reduce(operator.getitem, name.split("."), config)
