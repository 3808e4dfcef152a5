"""What a run reads from disk, without the disk: enough to know every shape of its training step.

A part whose folder is not on this machine is taken to be the public SANA models' (Gemma-2-2b, DC-AE f32c32 sana-1.1); its
tokenizer is replaced by one that cuts texts into words and punctuation marks, which gives the instruction 197 tokens. Only the length
of the tokens that the text encoder reads depends on it.
"""

import functools

import numpy as np
from absl import logging
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sana_jax.models import presets
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.text_encoder import TextEncoder
from sana_jax.training import sources
from sana_jax.training.sources import CachedLatents, Frozen, Sources


def stand_in_sources(config) -> Sources:
    """`open_sources` without weights, pictures or a working folder.

    Raises:
      ValueError: the config contradicts itself or what it names.
    """
    try:
        autoencoder = sources.frozen_autoencoder(config)
    except FileNotFoundError:
        _say(config.autoencoder_path, "DC-AE f32c32 sana-1.1")
        module = sources.with_dtype(Autoencoder(presets.dc_ae_f32c32_sana_1_1()), config.autoencoder_dtype)
        autoencoder = Frozen(module, _unreadable)
    try:
        encoder = sources.frozen_text_encoder(config)
    except FileNotFoundError:
        _say(config.text_encoder.path, "Gemma-2-2b")
        encoder = Frozen(sources.with_dtype(TextEncoder(presets.gemma2_2b()), config.dtype), _unreadable)
    try:
        tokenizer = sources.stored_tokenizer(config) or word_tokenizer()
    except FileNotFoundError:
        tokenizer = word_tokenizer()
    sources.check_tokenizer(config, tokenizer, encoder)
    open_latents = (
        functools.partial(stand_in_latents, autoencoder.module.config) if config.train.cache_latents else None
    )
    return Sources(
        sources.frozen_transformer(config),
        sources.frozen_teacher(config),
        autoencoder,
        encoder,
        tokenizer,
        open_latents,
    )


def word_tokenizer() -> Tokenizer:
    """Tokens are words and punctuation marks, all unknown; <bos> in front, as Gemma's tokenizer has it."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return words


def stand_in_latents(autoencoder_config):
    """In place of `train.cache_latents`' file: zeros of its shape."""

    def latents(size, indices, backgrounds):
        del backgrounds
        grid = (side // autoencoder_config.downsample_factor for side in size)
        return np.zeros((len(indices), *grid, autoencoder_config.latent_channels), np.float32)

    return CachedLatents(latents, latents)


def _say(path: str, model: str) -> None:
    logging.info("%s is not on this machine: the shapes are those of the public %s", path, model)


def _unreadable(*args, **kwargs):
    raise FileNotFoundError("a program that is compiled ahead of time has no weights.")
