"""Named sizes: functions that return the configurations of the public models, to be varied by keyword."""

from sana_jax.models.autoencoder import AutoencoderConfig
from sana_jax.models.text_encoder import TextEncoderConfig
from sana_jax.models.transformer import TransformerConfig

# The table grids of the public models that have a position table, and the scale of their coordinates.
_INTERPOLATION_SCALES = {64: 1.0, 128: 2.0}
# Continuous time t / 1000 and an embedded guidance scale.
_SPRINT = dict(qk_norm=True, guidance_embeds=True, timestep_scale=0.001, integer_timesteps=False)


def sana_600m(sample_size: int = 32, **overrides) -> TransformerConfig:
    """SANA 0.6B: 591.7 M parameters, for images of 32 * `sample_size` pixels (16: 512, 32: 1024)."""
    fields = dict(sample_size=sample_size, width=1152, num_layers=28, num_cross_attention_heads=16)
    return TransformerConfig(**{**fields, **overrides})


def sana_1600m(sample_size: int = 32, **overrides) -> TransformerConfig:
    """SANA 1.6B: 1604.5 M parameters; sample_size 16, 32, 64 (2K) or 128 (4K), the last two with a position table."""
    fields = dict(
        sample_size=sample_size,
        width=2240,
        num_layers=20,
        num_cross_attention_heads=20,
        interpolation_scale=_INTERPOLATION_SCALES.get(sample_size),
    )
    return TransformerConfig(**{**fields, **overrides})


def sana15_1600m(sample_size: int = 32, **overrides) -> TransformerConfig:
    """SANA-1.5 1.6B: as SANA 1.6B with RMSNorm on queries and keys; the model that is grown to 4.8B."""
    fields = dict(sample_size=sample_size, width=2240, num_layers=20, num_cross_attention_heads=20, qk_norm=True)
    return TransformerConfig(**{**fields, **overrides})


def sana15_2400m(sample_size: int = 32, **overrides) -> TransformerConfig:
    """SANA-1.5 pruned to 30 blocks: 2383.9 M parameters."""
    return sana15_1600m(sample_size, **{"num_layers": 30, **overrides})


def sana15_3200m(sample_size: int = 32, **overrides) -> TransformerConfig:
    """SANA-1.5 pruned to 40 blocks: 3163.2 M parameters."""
    return sana15_1600m(sample_size, **{"num_layers": 40, **overrides})


def sana15_4800m(sample_size: int = 32, **overrides) -> TransformerConfig:
    """SANA-1.5 4.8B: 60 blocks, 4721.8 M parameters."""
    return sana15_1600m(sample_size, **{"num_layers": 60, **overrides})


def sprint_600m(sample_size: int = 32, **overrides) -> TransformerConfig:
    """SANA-Sprint 0.6B: 593.5 M parameters."""
    return sana_600m(sample_size, **{**_SPRINT, **overrides})


def sprint_1600m(sample_size: int = 32, **overrides) -> TransformerConfig:
    """SANA-Sprint 1.6B: 1610.2 M parameters."""
    return sana15_1600m(sample_size, **{**_SPRINT, **overrides})


def gemma2_2b(**overrides) -> TextEncoderConfig:
    """Gemma-2-2b: 2614.3 M parameters without the language head; the text encoder of every public SANA model."""
    return TextEncoderConfig(**overrides)


def gemma2_tiny(vocab_size: int = 4096, **overrides) -> TextEncoderConfig:
    """Gemma-2's architecture small enough to train with the transformer on short captions: 2.8 M at 4096 tokens."""
    fields = dict(
        vocab_size=vocab_size,
        hidden_size=256,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=512,
        query_pre_attn_scalar=64,
    )
    return TextEncoderConfig(**{**fields, **overrides})


def gemma3_270m(**overrides) -> TextEncoderConfig:
    """Gemma-3-270m: 268.1 M parameters, 167.8 M of them embeddings."""
    fields = dict(
        vocab_size=262_144,
        hidden_size=640,
        num_layers=18,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        mlp_dim=2048,
        sliding_window=512,
        sliding_pattern=6,
        attn_logit_softcap=None,
        qk_norm=True,
        rope_theta=1_000_000.0,
        rope_local_theta=10_000.0,
    )
    return TextEncoderConfig(**{**fields, **overrides})


def dc_ae_f32c32_sana_1_1(**overrides) -> AutoencoderConfig:
    """DC-AE f32c32 sana-1.1: 312.3 M parameters. sana-1.0 is the same shape with the same encoder, another decoder."""
    scales = ((), (), (), (5,), (5,), (5,))
    fields = dict(
        encoder_block_types=_dc_ae_blocks(6),
        decoder_block_types=_dc_ae_blocks(6),
        encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
        decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    return AutoencoderConfig(**{**fields, **overrides})


def dc_ae_lite_f32c32_sana_1_1(**overrides) -> AutoencoderConfig:
    """DC-AE-Lite f32c32: sana-1.1's encoder and a decoder of ResBlocks alone, about 1.8 times as fast."""
    fields = dict(
        decoder_block_types="ResBlock",
        decoder_layers_per_block=(0, 3, 5, 4, 4, 4),
        decoder_qkv_multiscales=((),) * 6,
        upsample_block_type="pixel_shuffle",
        decoder_conv_act_fn="silu",
    )
    return dc_ae_f32c32_sana_1_1(**{**fields, **overrides})


def dc_ae_f32c32_in_1_0(**overrides) -> AutoencoderConfig:
    """DC-AE f32c32 in-1.0: 323.4 M parameters. mix-1.0 has the same shape and another scaling factor."""
    return _dc_ae_general(6, **{"scaling_factor": 0.3189, **overrides})


def dc_ae_f64c128_in_1_0(**overrides) -> AutoencoderConfig:
    """DC-AE f64c128 in-1.0: 676.9 M parameters. mix-1.0 has the same shape and another scaling factor."""
    return _dc_ae_general(7, **{"latent_channels": 128, "scaling_factor": 0.2889, **overrides})


def dc_ae_f128c512_in_1_0(**overrides) -> AutoencoderConfig:
    """DC-AE f128c512 in-1.0 and mix-1.0: 1120.7 M parameters; the scaling factor is in their config.json."""
    return _dc_ae_general(8, **{"latent_channels": 512, **overrides})


def _dc_ae_general(stages: int, **overrides) -> AutoencoderConfig:
    """The in- and mix-1.0 family: stage 0 empty, BatchNorm in the fine stages of the decoder."""
    widths = (128, 256, 512, 512, 1024, 1024, 2048, 2048)[:stages]
    coarse = stages - 3
    fields = dict(
        encoder_block_types=_dc_ae_blocks(stages),
        decoder_block_types=_dc_ae_blocks(stages),
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 4, 8) + (2,) * coarse,
        decoder_layers_per_block=(0, 5, 10) + (2,) * coarse,
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * coarse,
        decoder_act_fns=("relu",) * 3 + ("silu",) * coarse,
    )
    return AutoencoderConfig(**{**fields, **overrides})


def _dc_ae_blocks(stages: int) -> tuple[str, ...]:
    return ("ResBlock",) * 3 + ("EfficientViTBlock",) * (stages - 3)
