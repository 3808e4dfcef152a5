"""The embedded model: text to 64x64 emoji, linear DiT on 4x4 latents, Gemma-2-type text encoder trained jointly.

Hardware   2 CPU cores, 50 minutes in bfloat16 where they have instructions for it (the embedded model's RUN.md), 80 in float32.
Command    python train.py --config=configs/emoji.py --workdir=runs/emoji --config.train.cache_latents=True
           (100 steps, to see pictures: python train.py --config=configs/emoji.py --workdir=runs/emoji --config.train.num_steps=100)
"""

from configs import base
from sana_jax.models.text_encoder import TextEncoderConfig
from sana_jax.models.transformer import TransformerConfig


def get_config():
    config = base.get_config()
    config.model = base.fields(
        TransformerConfig(
            sample_size=4,
            in_channels=64,
            out_channels=64,
            width=256,
            num_layers=6,
            attention_head_dim=32,
            num_cross_attention_heads=4,
            caption_channels=192,
            mlp_ratio=2.5,
            qk_norm=True,
            unroll=6,
        )
    )
    config.text_encoder.max_length = 24  # no caption of the set is longer than 28 tokens, 999 of 1,000 not than 24
    config.text_encoder.model = base.fields(
        TextEncoderConfig(
            vocab_size=6144,
            hidden_size=192,
            num_layers=2,
            num_heads=3,
            num_kv_heads=1,
            head_dim=64,
            mlp_dim=384,
            sliding_window=24,
            query_pre_attn_scalar=64,
            unroll=2,
        )
    )
    config.data.image_size = 64
    config.data.batch_size = 64
    config.data.captions.keyword_share = 0.3
    config.data.captions.max_keywords = 2
    config.train.num_steps = 8_000
    config.train.flow_shift = 3.0
    config.train.log_every = 25
    config.train.sample_every = 500
    config.train.checkpoint_every = 500
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.muon_rms = 0.5
    config.optimizer.betas = (0.9, 0.99)
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "linear"
    config.ema.decay = 0.999
    config.sample.guidance_scale = 3.0
    return config
