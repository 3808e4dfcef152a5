"""DC-AE for 64x64 emoji: f16, 64 channels, so that a picture is 4x4 latents: the autoencoder of the embedded model.

Hardware   2 CPU cores, 11 minutes to 27.5 dB on held-out pictures (see the embedded model's RUN.md).
Command    python train.py --config=configs/emoji_autoencoder.py --workdir=runs/emoji_autoencoder
"""

from configs import base
from sana_jax.models.autoencoder import AutoencoderConfig


def get_config():
    config = base.get_config()
    config.task = "autoencoder"
    config.model = base.fields(
        AutoencoderConfig(
            latent_channels=64,
            encoder_block_types=("ResBlock",) * 5,
            decoder_block_types=("ResBlock",) * 5,
            encoder_block_out_channels=(16, 32, 64, 128, 256),
            decoder_block_out_channels=(16, 32, 64, 128, 256),
            encoder_layers_per_block=(0, 1, 1, 1, 1),
            decoder_layers_per_block=(0, 1, 1, 2, 2),
            encoder_qkv_multiscales=((),) * 5,
            decoder_qkv_multiscales=((),) * 5,
        )
    )
    config.reconstruction = "l2"
    config.data.image_size = 64
    config.data.batch_size = 16
    config.train.num_steps = 2_250
    config.train.log_every = 50
    config.train.sample_every = 500
    config.train.checkpoint_every = 500
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.muon_rms = 0.5
    config.optimizer.betas = (0.9, 0.99)
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "linear"
    config.ema.decay = 0.998
    return config
