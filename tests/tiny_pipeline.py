"""A whole model small enough for unit tests, with random non-zero values in every parameter."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from sana_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sana_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.tokenizer import train_tokenizer
from sana_jax.weights.folder import PipelineParts, SamplingDefaults, abstract_params

CAPTIONS = ["a red apple on a blue background", "a green pear, glossy, 3d", "the quick brown fox", "a flat yellow star"]
TRANSFORMER = dict(
    sample_size=4,
    in_channels=8,
    out_channels=8,
    width=64,
    num_layers=2,
    num_cross_attention_heads=4,
    caption_channels=32,
)
AUTOENCODER = dict(
    latent_channels=8,
    attention_head_dim=8,
    encoder_block_out_channels=(8, 16, 16),
    decoder_block_out_channels=(8, 16, 16),
    encoder_layers_per_block=(1, 1, 1),
    decoder_layers_per_block=(1, 1, 1),
    encoder_block_types=("ResBlock", "ResBlock", "ResBlock"),
    decoder_block_types=("ResBlock", "ResBlock", "ResBlock"),
    encoder_qkv_multiscales=((), (), (5,)),
    decoder_qkv_multiscales=((), (), (5,)),
    scaling_factor=0.7,
)
TEXT_ENCODER = dict(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp_dim=48,
    sliding_window=64,
    query_pre_attn_scalar=16,
)


@contextlib.contextmanager
def compilation_cache_off():
    """JAX asks once in a process whether its compilation cache is on, and again after `reset_cache`."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def random_params(module, seed: int, std: float = 0.1):
    """Every parameter filled with small numbers, none left at an initial zero or one. float32 NumPy."""
    rng = np.random.default_rng(seed)
    draw = lambda x: (std * rng.normal(size=x.shape)).astype(np.float32)
    return jax.tree.map(draw, abstract_params(module))


@functools.cache
def tiny_parts() -> PipelineParts:
    """16x16 pictures, 4x4 latents of 8 channels, 12 text tokens."""
    modules = (
        SanaTransformer(TransformerConfig(**TRANSFORMER)),
        Autoencoder(AutoencoderConfig(**AUTOENCODER)),
        TextEncoder(TextEncoderConfig(**TEXT_ENCODER)),
    )
    parts = [(module, random_params(module, seed)) for seed, module in enumerate(modules)]
    defaults = SamplingDefaults(complex_human_instruction=None, max_sequence_length=12, num_inference_steps=3)
    return PipelineParts(*parts, train_tokenizer(CAPTIONS, 300), defaults)


@functools.cache
def tiny_binned_parts() -> PipelineParts:
    """`tiny_parts` of the public 512 family: 16x16 latents and an autoencoder of factor 32."""
    stages = dict(block_out_channels=(4, 4, 4, 4, 8, 8), layers_per_block=(1,) * 6)
    stages |= dict(block_types=("ResBlock",) * 6, qkv_multiscales=((),) * 6)
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in stages.items()}
    modules = (
        SanaTransformer(TransformerConfig(**TRANSFORMER | dict(sample_size=16))),
        Autoencoder(AutoencoderConfig(**AUTOENCODER | sides)),
    )
    transformer, autoencoder = ((module, random_params(module, seed, 0.3)) for seed, module in enumerate(modules))
    return tiny_parts()._replace(transformer=transformer, autoencoder=autoencoder)


@functools.cache
def tiny_sprint_parts() -> PipelineParts:
    """`tiny_parts` with a transformer of SANA-Sprint: guidance embedding, q/k norm, continuous time."""
    config = TransformerConfig(
        **TRANSFORMER, qk_norm=True, guidance_embeds=True, timestep_scale=0.001, integer_timesteps=False
    )
    module, defaults = SanaTransformer(config), dict(solver="scm", num_inference_steps=2)
    return tiny_parts()._replace(
        transformer=(module, random_params(module, 7)), defaults=dataclasses.replace(tiny_parts().defaults, **defaults)
    )
