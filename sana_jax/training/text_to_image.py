"""Task "transformer": it learns on the latents of a frozen autoencoder, by flow matching or from a teacher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.lax import with_sharding_constraint

from sana_jax import flops, prompts
from sana_jax.bit_depth import from_eight_bits
from sana_jax.diffusion import trigflow
from sana_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.parallel.autoencoder import apply_in_parts
from sana_jax.parallel.sharding import LATENTS
from sana_jax.parallel.transformer import check_rows
from sana_jax.sampling.plan import plan_sampling
from sana_jax.sampling.program import Control, Features, Inputs, Modules, Text, draw
from sana_jax.training.adapter import make_adapter
from sana_jax.training.caption_tokens import CutWarning, check_instruction, instruction_tokens
from sana_jax.training.distillation import make_distillation
from sana_jax.training.flow_matching import make_flow_matching
from sana_jax.training.settings import check_sides, loader_config, model_config
from sana_jax.training.sources import Sources
from sana_jax.training.start import TEXT_SETTINGS, Change, load_start, other_settings
from sana_jax.training.task import Task
from sana_jax.weights import folder, parts

FEW_STEPS = 4
HELDOUT_DRAWS = 8  # noise levels and noises per held-out picture; the loss of a single draw says little


def make_text_to_image_task(config, sources: Sources) -> Task:
    """The transformer of `config.model`, or an `Adapter` of it, with its text encoder trained jointly or frozen; see `Task`.

    Pictures are encoded within the step, or all of them beforehand (`train.cache_latents`). The instruction before the
    captions is encoded once where the text encoder is frozen. What the transformer learns of them is an `Objective`.

    Args:
      config: the whole tree.
      sources: what it names.

    Raises:
      ValueError: the config contradicts itself or what it names.
    """
    text, train = config.text_encoder, config.train
    transformer = SanaTransformer(model_config(TransformerConfig, config.model, config.dtype, "model"))
    autoencoder, text_tokenizer = sources.autoencoder.module, sources.tokenizer
    check_sizes(config, transformer.config, autoencoder.config)
    scale = autoencoder.config.scaling_factor
    joint = sources.text_encoder is None
    untrained = {"autoencoder": sources.autoencoder}
    adapter = make_adapter(config, transformer)
    net = adapter.net if adapter else None
    controlled = net is not None
    if adapter:
        untrained["transformer"] = sources.transformer
    if sources.teacher:
        untrained["teacher"] = sources.teacher
    if joint:
        encoder = TextEncoder(model_config(TextEncoderConfig, text.model, config.dtype, "text_encoder.model"))
        check_writable(encoder.config)
    else:
        untrained["text_encoder"] = sources.text_encoder
        encoder = sources.text_encoder.module
    if encoder.config.hidden_size != transformer.config.caption_channels:
        raise ValueError(
            f"model.caption_channels={transformer.config.caption_channels} is not the text encoder's hidden_size="
            f"{encoder.config.hidden_size}. Use model.caption_channels={encoder.config.hidden_size}."
        )
    instruction = prompts.INSTRUCTIONS[text.instruction] if text.use_instruction else None
    shared = None if joint or instruction is None else instruction_tokens(text_tokenizer, instruction, text.max_length)
    text_settings = instruction, text.max_length, text.lower_case

    defaults = folder.SamplingDefaults(
        complex_human_instruction=instruction,
        lower_case=text.lower_case,
        null_mask=text.null_mask,
        max_sequence_length=text.max_length,
        num_inference_steps=config.sample.num_inference_steps,
        guidance_scale=config.sample.guidance_scale,
        flow_shift=train.flow_shift,
        solver="scm" if sources.teacher else "flow_dpm",
    )
    if sources.teacher and defaults.num_inference_steps > FEW_STEPS:
        logging.warning(
            "the student is drawn, and exported to be drawn, in sample.num_inference_steps=%d steps; SANA-Sprint takes 1 to %d",
            defaults.num_inference_steps,
            FEW_STEPS,
        )
    if adapter and (other := other_settings(config.init_from, (*TEXT_SETTINGS, "flow_shift"), defaults, autoencoder)):
        logging.warning(
            "what trains is given other settings than the model at %s has, with which it will draw: %s",
            config.init_from,
            other,
        )
    teacher = config.distillation.teacher
    if teacher and (other := other_settings(teacher, TEXT_SETTINGS, defaults, autoencoder)):
        logging.warning(
            "the student, and its teacher with it, is given other captions or latents than those of the model at %s: %s",
            teacher,
            other,
        )
    modules, size = Modules(transformer, autoencoder, encoder, net), (config.data.image_size,) * 2
    sampling = plan_sampling(
        modules,
        defaults,
        size=size,
        generated=size,
        guidance_scale=defaults.guidance_scale,
        output_type="latent",
        controlled=controlled,
    )

    warn_if_cut = CutWarning(text_tokenizer, *text_settings)

    def tokenize(captions):
        """Without the tokens that are `shared`."""
        ids, mask = prompts.tokenize_prompts(text_tokenizer, captions, *text_settings)
        warn_if_cut(captions, mask)
        if shared is None:
            return ids, mask
        check_instruction(ids, shared, captions)
        return ids[:, len(shared) :], mask[:, len(shared) :]

    def text_weights(params, frozen):
        return params["text_encoder"] if joint else frozen["text_encoder"]

    if sources.teacher:
        objective = make_distillation(config, transformer, sources.teacher.module)
    else:
        objective = make_flow_matching(config, transformer, adapter)

    def encode_text(params, frozen, ids, mask):
        weights = text_weights(params, frozen)
        return Features(*prompts.read_features(encoder, weights, ids, mask, frozen.get("instruction"), text.max_length))

    null_tokens = prompts.tokenize_prompts(text_tokenizer, [""], None, text.max_length)

    def encode_null(params, frozen):
        weights = text_weights(params, frozen)
        return prompts.read_features(encoder, weights, *map(jnp.asarray, null_tokens), None, text.max_length)

    def encode_instruction(frozen):
        return encoder.apply({"params": frozen["text_encoder"]}, shared, method="encode_prefix")

    def null_features(params, frozen):
        return Features(*(encode_null(params, frozen) if joint else frozen["null_prompt"]))

    frozen_shapes = {name: part.shapes() for name, part in untrained.items()}
    if not joint:
        frozen_shapes["null_prompt"] = jax.eval_shape(encode_null, {}, frozen_shapes)
    if shared is not None:
        frozen_shapes["instruction"] = jax.eval_shape(encode_instruction, frozen_shapes)

    def init(key):
        key_transformer, key_text = jax.random.split(key)
        if adapter:
            return adapter.init(key_transformer)
        side = transformer.config.sample_size
        features = jnp.zeros((1, text.max_length, encoder.config.hidden_size))
        mask = jnp.ones((1, text.max_length), jnp.int32)
        latents = jnp.zeros((1, side, side, transformer.config.in_channels))
        guidance = jnp.zeros(1) if transformer.config.guidance_embeds else None
        params = {
            "transformer": transformer.init(key_transformer, latents, jnp.zeros(1), features, mask, guidance)["params"]
        }
        if joint:
            params["text_encoder"] = encoder.init(key_text, mask, mask)["params"]
        return params | objective.init(jax.random.fold_in(key, 1))

    def load_initial(places):
        """Weights of the transformer, and of the text encoder where it trains, from `config.init_from`, or from the teacher.

        What is not there starts at random.
        """
        path, change = config.init_from, Change(tuple(config.init_adapts), tuple(config.init_blocks))
        if not path:
            path, change = config.distillation.teacher, Change(("guidance_embeds", "guidance_embeds_scale"))
        elif sources.teacher and config.distillation.tangent_warmup:
            logging.info(
                "critic and variance start anew, and the tangent from zero; a student that has been trained needs no "
                "distillation.tangent_warmup=%d: use 0",
                config.distillation.tangent_warmup,
            )
        start = functools.partial(load_start, path=path)
        key = jax.random.key(config.seed)
        params = {
            "transformer": start(
                parts.TRANSFORMER,
                folder.load_transformer,
                transformer.config,
                places=places["transformer"],
                change=change,
                init=lambda key: init(key)["transformer"],
                key=key,
            )
        }
        if joint:
            params["text_encoder"] = start(
                parts.TEXT_ENCODER, folder.load_text_encoder, encoder.config, places=places["text_encoder"]
            )
        beside = jax.eval_shape(objective.init, key)
        return params | jax.jit(objective.init, out_shardings={name: places[name] for name in beside})(key)

    def load_frozen(places):
        frozen = {name: part.load_onto(places[name]) for name, part in untrained.items()}
        if not joint:  # the same in every step
            frozen["null_prompt"] = jax.jit(encode_null, out_shardings=places["null_prompt"])({}, frozen)
        if shared is not None:
            frozen["instruction"] = jax.jit(encode_instruction, out_shardings=places["instruction"])(frozen)
        return frozen

    def scaled_latents(frozen, batch, images="images", latents="latents"):
        if latents in batch:
            found = batch[latents]
        else:
            found = apply_in_parts(autoencoder, frozen["autoencoder"], from_eight_bits(batch[images]), "encode")
        return with_sharding_constraint(jax.lax.stop_gradient(found) * scale, LATENTS)

    def scaled_hint(frozen, batch):
        return scaled_latents(frozen, batch, "controls", "control_latents") if controlled else None

    def loss(params, frozen, batch, keys, step):
        features = encode_text(params, frozen, batch["token_ids"], batch["token_mask"])
        null, latents, hint = null_features(params, frozen), scaled_latents(frozen, batch), scaled_hint(frozen, batch)
        losses, measured = objective.losses(params, frozen, latents, hint, features, null, keys, step)
        metrics = {"loss": jnp.mean(losses), "latent_std": jnp.std(latents)} | measured
        return metrics["loss"], metrics

    def show(params, frozen, batch):
        """Draws as the exported pipeline does, from noise of the seed."""
        latents, hint = scaled_latents(frozen, batch), scaled_hint(frozen, batch)
        own = encode_text(params, frozen, batch["own_token_ids"], batch["own_token_mask"])
        null = null_features(params, frozen)
        keys = jax.random.split(jax.random.key(config.seed), (HELDOUT_DRAWS, latents.shape[0]))
        losses = jax.lax.map(lambda keys: objective.heldout(params, frozen, latents, hint, own, null, keys), keys)
        weights = {
            "transformer": adapter.weights(params, frozen) if adapter else params["transformer"],
            "text_encoder": text_weights(params, frozen),
            "autoencoder": frozen["autoencoder"],
        }
        control = None
        if controlled:
            weights["controlnet"] = params["controlnet"]
            control = Control(from_eight_bits(batch["controls"]), jnp.float32(1))
        inputs = Inputs(
            text=Text(batch["token_ids"], batch["token_mask"], frozen.get("instruction")),
            null=null if sampling.guided else None,
            noise=jax.random.normal(jax.random.key(config.seed), latents.shape),
            guidance_scale=jnp.float32(config.sample.guidance_scale),
            interval=None,
            pag=None,
            image=None,
            step_noise=step_noise(latents.shape) if sources.teacher else None,
            control=control,
        )
        drawn = draw(modules, weights, inputs, sampling=sampling).result
        images = apply_in_parts(autoencoder, frozen["autoencoder"], drawn / scale, "decode")
        if controlled:  # each after the one that guided it
            images = jnp.stack([control.image.astype(images.dtype), images], 1).reshape(-1, *images.shape[1:])
        return images, {f"{config.sample.split}_loss": jnp.mean(losses), "sample_std": jnp.std(drawn)}

    def step_noise(shape):
        return trigflow.step_noise(config.seed, range(shape[0]), sampling.num_steps, tuple(shape[1:]))

    def prepare(batch) -> dict[str, np.ndarray]:
        ids, mask = tokenize(batch["captions"])
        text = {"token_ids": ids, "token_mask": mask}
        if cached is None:
            return {"images": batch["images"]} | text | ({"controls": batch["controls"]} if controlled else {})
        which = batch["size"], batch["indices"], batch["backgrounds"]
        latents = {"latents": cached.pictures(*which)}
        if controlled:
            latents["control_latents"] = cached.controls(*which)
        return latents | text

    def prepare_heldout(batch) -> dict[str, np.ndarray]:
        """Also tokens of the captions to draw: `sample.prompts` first, then the pictures' own."""
        asked = list(config.sample.prompts)[: len(batch["captions"])]
        own_ids, own_mask = tokenize(batch["captions"])
        ids, mask = tokenize(asked + list(batch["captions"])[len(asked) :])
        return {
            "images": batch["images"],
            "token_ids": ids,
            "token_mask": mask,
            "own_token_ids": own_ids,
            "own_token_mask": own_mask,
        } | ({"controls": batch["controls"]} if controlled else {})

    def picture_flops(height, width):
        factor = autoencoder.config.downsample_factor
        velocity = flops.transformer_flops(transformer.config, height // factor, width // factor, text.max_length)
        before = 0 if shared is None else len(shared)
        encoding = flops.text_encoder_flops(encoder.config, tokenize([""])[0].shape[1], before)
        encoded = 0 if train.cache_latents else 1 + controlled
        latents = encoded * flops.encoder_flops(autoencoder.config, height, width)
        text_part = {"trained": encoding} if joint else {"frozen": encoding}
        return objective.picture_flops(velocity) + flops.training_flops(**text_part) + latents

    def measure(params, batch):
        del params, batch
        return {}

    def export(params, path, measured, before):
        del measured
        if adapter:
            return adapter.export(params, path, train.export_dtype)
        beside = {name: part for name, part in untrained.items() if name != "teacher"}
        if before is not None and (before / "model_index.json").is_file():  # else somebody has moved it away
            stored = dict.fromkeys(beside, before)
        else:
            stored = {name: part.load(train.export_dtype) for name, part in beside.items()}
        folder.save_pipeline(
            path,
            transformer=(transformer, params["transformer"]),
            autoencoder=stored["autoencoder"],
            text_encoder=(encoder, params["text_encoder"]) if joint else stored["text_encoder"],
            tokenizer=text_tokenizer,
            defaults=defaults,
            dtype=train.export_dtype,
        )

    cached = sources.open_latents() if sources.open_latents else None

    if adapter:
        load_initial = adapter.load_initial
    elif not config.init_from and not sources.teacher:
        load_initial = None
    return Task(
        init=init,
        load_initial=load_initial,
        frozen=frozen_shapes,
        load_frozen=load_frozen,
        prepare=prepare,
        prepare_heldout=prepare_heldout,
        loss=loss,
        picture_flops=picture_flops,
        show=show,
        columns=8,
        measure=measure,
        export=export,
    )


def check_writable(text_config: TextEncoderConfig) -> None:
    """Raises ValueError where no file of the public layout can hold the text encoder that is to train."""
    try:
        parts.TEXT_ENCODER.layout.config_to_json(text_config)
    except ValueError as error:
        raise ValueError(f"config.text_encoder.model: {error}") from error


def check_sizes(config, transformer_config, autoencoder_config) -> None:
    """Raises ValueError where the pictures, the autoencoder, the transformer and the mesh do not fit together."""
    factor, size = autoencoder_config.downsample_factor, config.data.image_size
    check_sides(config, factor * transformer_config.patch_size, "the autoencoder's factor times model.patch_size")
    for ratio, height, width in loader_config(config.data).buckets:
        try:
            check_rows(transformer_config, height // factor, config.mesh.seq)
        except ValueError as error:
            raise ValueError(
                f"{error} Or leave {ratio} out of data.aspect_ratios, whose pictures are of {height}x{width} pixels."
            ) from error
    for name in ("in_channels", "out_channels"):
        if getattr(transformer_config, name) != autoencoder_config.latent_channels:
            raise ValueError(
                f"model.{name}={getattr(transformer_config, name)}, the autoencoder's latents have "
                f"{autoencoder_config.latent_channels} channels. Use model.{name}={autoencoder_config.latent_channels}."
            )
    if size // factor != transformer_config.sample_size:
        raise ValueError(
            f"model.sample_size={transformer_config.sample_size}, data.image_size={size} gives latents of side "
            f"{size // factor}. Use model.sample_size={size // factor}."
        )
