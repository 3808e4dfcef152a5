"""Task "transformer": flow matching on the latents of a frozen autoencoder (SANA section 3.4; sana.md 5.1 and 6)."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import with_sharding_constraint
from jaxtyping import Array, Float

from sana_jax import atomic, prompts, tokenizer
from sana_jax.data import latent_cache, picture_set
from sana_jax.data.captions import random_caption
from sana_jax.data.loader import LoaderConfig
from sana_jax.diffusion import flow, guidance, solvers
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.parallel import multihost
from sana_jax.parallel.sharding import LATENTS
from sana_jax.parallel.transformer import apply_transformer
from sana_jax.training.settings import check_same_model, loader_config, model_config
from sana_jax.training.task import Task
from sana_jax.weights import folder
from sana_jax.weights.model_index import EMBEDDED_MODEL, pipeline_folder

HELDOUT_DRAWS = 8  # noise levels and noises per held-out picture; the loss of a single draw says little


def make_text_to_image_task(config, text_tokenizer, workdir: str) -> Task:
    """The transformer of `config.model`, with its text encoder trained jointly or frozen; see `Task`.

    Pictures are encoded within the step, or all of them beforehand (`train.cache_latents`). A caption dropped for
    classifier-free guidance is replaced by the empty prompt, token mask included, as the sampler gives it. (The public
    trainer keeps the caption's mask, so that its null branch sees as many null features as the caption had tokens; its
    sampler in diffusers does not.)

    Args:
      config: the whole tree.
      text_tokenizer: the `tokenizers.Tokenizer` that goes with the text encoder.
      workdir: where cached latents are kept.

    Raises:
      ValueError: the config contradicts itself or the weights it names.
    """
    text, train = config.text_encoder, config.train
    transformer = SanaTransformer(model_config(TransformerConfig, config.model, config.dtype, "model"))
    autoencoder, autoencoder_params = folder.load_autoencoder(config.autoencoder_path or EMBEDDED_MODEL)
    autoencoder = Autoencoder(dataclasses.replace(autoencoder.config, dtype=config.autoencoder_dtype))
    check_sizes(config, transformer.config, autoencoder.config)
    scale = autoencoder.config.scaling_factor
    joint = text.mode == "train"
    frozen = {"autoencoder": autoencoder_params}
    if joint:
        sizes = model_config(TextEncoderConfig, text.model, config.dtype, "text_encoder.model")
        encoder = TextEncoder(sizes)
    elif text.mode == "frozen":
        encoder, frozen["text_encoder"] = folder.load_text_encoder(text.path)
        encoder = TextEncoder(dataclasses.replace(encoder.config, dtype=config.dtype))
    else:
        raise ValueError(f"text_encoder.mode={text.mode!r} is not one of train, frozen.")
    if encoder.config.hidden_size != transformer.config.caption_channels:
        raise ValueError(
            f"model.caption_channels={transformer.config.caption_channels} is not the text encoder's hidden_size="
            f"{encoder.config.hidden_size}. Use model.caption_channels={encoder.config.hidden_size}."
        )
    instruction = prompts.COMPLEX_HUMAN_INSTRUCTION if text.use_instruction else None

    defaults = folder.SamplingDefaults(
        complex_human_instruction=instruction,
        max_sequence_length=text.max_length,
        num_inference_steps=config.sample.num_inference_steps,
        guidance_scale=config.sample.guidance_scale,
        flow_shift=train.flow_shift,
    )

    def tokenize(captions, instruction=instruction):
        return prompts.tokenize_prompts(text_tokenizer, captions, instruction, text.max_length)

    def encode_text(params, frozen, ids, mask):
        weights = params["text_encoder"] if joint else frozen["text_encoder"]
        hidden = encoder.apply({"params": weights}, ids, mask)
        return prompts.select_features(hidden, mask, text.max_length)

    def null_features(params, frozen):
        return encode_text(params, frozen, *map(jnp.asarray, tokenize([""], None)))

    def init(key):
        key_transformer, key_text = jax.random.split(key)
        side = transformer.config.sample_size
        features = jnp.zeros((1, text.max_length, encoder.config.hidden_size))
        mask = jnp.ones((1, text.max_length), jnp.int32)
        latents = jnp.zeros((1, side, side, transformer.config.in_channels))
        params = {"transformer": transformer.init(key_transformer, latents, jnp.zeros(1), features, mask)["params"]}
        if joint:
            params["text_encoder"] = encoder.init(key_text, mask, mask)["params"]
        return params

    def velocity(params, latents, timesteps, features, mask):
        return apply_transformer(transformer, params["transformer"], latents, timesteps, features, mask)

    def encode_pictures(params, images):
        return autoencoder.apply({"params": params}, images, method="encode")

    def scaled_latents(frozen, batch):
        latents = batch["latents"] if "latents" in batch else encode_pictures(frozen["autoencoder"], batch["images"])
        return with_sharding_constraint(jax.lax.stop_gradient(latents) * scale, LATENTS)

    cached = cache_latents(config, encode_pictures, autoencoder_params, workdir) if train.cache_latents else None

    def flow_loss(params, latents, features, mask, key) -> Float[Array, " B"]:
        key_sigma, key_noise = jax.random.split(key)
        sigma, timesteps = flow.sample_sigmas(
            key_sigma, latents.shape[0], train.flow_shift, integer_timesteps=transformer.config.integer_timesteps
        )
        noise = jax.random.normal(key_noise, latents.shape)
        output = velocity(params, flow.interpolate(latents, noise, sigma), timesteps, features, mask)
        return flow.flow_loss(output, latents, noise)

    def loss(params, frozen, batch, key, step):
        del step
        key_drop, key_flow = jax.random.split(key)
        ids, mask = batch["token_ids"], batch["token_mask"]
        dropped = jax.random.bernoulli(key_drop, train.class_dropout_prob, (ids.shape[0],))
        features, mask = encode_text(params, frozen, ids, mask)
        null, null_mask = null_features(params, frozen)
        features = jnp.where(dropped[:, None, None], null, features)
        mask = jnp.where(dropped[:, None], null_mask, mask)
        latents = scaled_latents(frozen, batch)
        mean = jnp.mean(flow_loss(params, latents, features, mask, key_flow))
        return mean, {"loss": mean, "latent_std": jnp.std(latents)}

    def show(params, frozen, batch):
        features, mask = encode_text(params, frozen, batch["token_ids"], batch["token_mask"])
        latents = scaled_latents(frozen, batch)
        own_features, own_mask = encode_text(params, frozen, batch["own_token_ids"], batch["own_token_mask"])
        keys = jax.random.split(jax.random.key(config.seed), HELDOUT_DRAWS)
        losses = jax.lax.map(lambda key: flow_loss(params, latents, own_features, own_mask, key), keys)
        null, null_mask = null_features(params, frozen)
        null, null_mask = jnp.broadcast_to(null, features.shape), jnp.broadcast_to(null_mask, mask.shape)
        guided = guidance.classifier_free_guidance(
            lambda x, t, condition: velocity(params, x, t, *condition),
            (features, mask),
            (null, null_mask),
            config.sample.guidance_scale,
        )
        solver = solvers.flow_dpm(
            config.sample.num_inference_steps,
            train.flow_shift,
            integer_timesteps=transformer.config.integer_timesteps,
        )
        noise = jax.random.normal(jax.random.key(config.seed), latents.shape)
        drawn = solvers.sample(guided, noise, solver)
        images = autoencoder.apply({"params": frozen["autoencoder"]}, drawn / scale, method="decode")
        return images, {"heldout_loss": jnp.mean(losses), "sample_std": jnp.std(drawn)}

    def prepare(batch) -> dict[str, np.ndarray]:
        ids, mask = tokenize(batch["captions"])
        if cached is None:
            return {"images": batch["images"], "token_ids": ids, "token_mask": mask}
        latents = cached(batch["indices"], batch["backgrounds"])
        return {"latents": latents, "token_ids": ids, "token_mask": mask}

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
        }

    def measure(params, batch):
        del params, batch
        return {}

    def export(params, path, measured):
        del measured
        weights = params["text_encoder"] if joint else frozen["text_encoder"]
        folder.save_pipeline(
            path,
            transformer=(transformer, params["transformer"]),
            autoencoder=(autoencoder, frozen["autoencoder"]),
            text_encoder=(encoder, weights),
            tokenizer=text_tokenizer,
            defaults=defaults,
            dtype=train.export_dtype,
        )

    return Task(
        init=init,
        initial=start_weights(config, transformer.config, encoder.config) if config.init_from else None,
        frozen=frozen,
        prepare=prepare,
        prepare_heldout=prepare_heldout,
        loss=loss,
        show=show,
        columns=8,
        measure=measure,
        export=export,
    )


def cache_latents(config, encode, autoencoder_params, workdir: str) -> latent_cache.LatentCache:
    """Latents of all training pictures, from WORKDIR/latents, or computed now on this process's first device.

    Raises:
      ValueError: pictures are shifted at random, so that they cannot be listed.
    """
    data = loader_config(config.data)
    if data.max_shift:
        raise ValueError(
            f"train.cache_latents=True needs pictures that do not vary, data.max_shift={data.max_shift} moves them. "
            "Set one of them to False or 0."
        )
    params = jax.device_put(autoencoder_params, jax.local_devices()[0])
    encode = jax.jit(encode)

    def open_cache():
        pictures = picture_set.open_set(data.path, split=data.split, image_size=data.image_size, cache_mb=data.cache_mb)
        return latent_cache.open_latent_cache(
            pathlib.Path(workdir) / "latents",
            pictures,
            data.backgrounds,
            lambda images: np.asarray(encode(params, images)),
            latent_cache.digest(jax.tree.leaves(autoencoder_params)) + config.autoencoder_dtype,
        )

    cache = open_cache() if multihost.is_first() else None
    multihost.barrier("latents")
    # The others read what the first process wrote or, where hosts share no file system, write a file of their own.
    return cache or open_cache()


def start_weights(config, transformer_config, encoder_config):
    """Weights of the transformer, and of the text encoder where it trains, from the folder `config.init_from`."""
    path = config.init_from
    loaded, weights = folder.load_transformer(path)
    check_same_model(transformer_config, loaded.config, path)
    params = {"transformer": weights}
    if config.text_encoder.mode == "train":
        loaded, params["text_encoder"] = folder.load_text_encoder(path)
        check_same_model(encoder_config, loaded.config, path)
    return params


def make_tokenizer(config, workdir: str):
    """The tokenizer that a config asks for: the frozen encoder's, a file's, that of the weights to start from, or one
    trained on the captions and kept in WORKDIR/tokenizer.
    """
    text, kept = config.text_encoder, pathlib.Path(workdir) / "tokenizer"
    if text.mode == "frozen":
        return tokenizer.load(pipeline_folder(text.path))
    if multihost.from_first([kept.is_dir()])[0]:  # else a process would see what the first has just made
        return tokenizer.load(kept)
    if text.tokenizer:
        return tokenizer.load(text.tokenizer)
    if config.init_from:
        return tokenizer.load(pipeline_folder(config.init_from))
    if multihost.is_first():
        captions = caption_corpus(loader_config(config.data), config.seed)
        with atomic.new_folder(kept) as folder:
            tokenizer.save(tokenizer.train_tokenizer(captions, text.model.vocab_size), folder)
    multihost.barrier("tokenizer")
    return tokenizer.load(kept)


def caption_corpus(data: LoaderConfig, seed: int, draws: int = 8) -> list[str]:
    """Captions as training draws them, `draws` for each emoji; every caption of a photograph."""
    rng = np.random.default_rng(seed)
    texts = []
    for record in picture_set.open_set(data.path, split=data.split, image_size=data.image_size, cache_mb=0).records:
        texts.extend(record.captions)
        if record.emoji is not None:
            for background in rng.choice(data.backgrounds, draws):
                emoji = record.emoji
                texts.append(random_caption(data.captions, emoji.label, emoji.style, emoji.tags, background, rng))
    return texts


def check_sizes(config, transformer_config, autoencoder_config) -> None:
    """Raises ValueError where the pictures, the autoencoder and the transformer do not fit together."""
    factor, size = autoencoder_config.downsample_factor, config.data.image_size
    if size % (factor * transformer_config.patch_size):
        raise ValueError(
            f"data.image_size={size} is not a multiple of {factor} (autoencoder) times {transformer_config.patch_size} "
            f"(model.patch_size). Use a multiple of {factor * transformer_config.patch_size}."
        )
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
