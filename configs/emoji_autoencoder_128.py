"""DC-AE for 128x128 emoji: f16, 32 channels, 8x8 latents: the embedded model's autoencoder where a GPU trains it.

Hardware   one GPU; not run yet (benchmarks/gpu_session.py does).
Command    python train.py --config=configs/emoji_autoencoder_128.py --workdir=runs/emoji_autoencoder_128
"""

from configs import emoji_autoencoder


def get_config():
    config = emoji_autoencoder.get_config()
    config.dtype = "bfloat16"
    config.model.latent_channels = 32
    config.model.encoder_layers_per_block = (0, 2, 2, 2, 2)
    config.model.decoder_layers_per_block = (0, 2, 3, 3, 3)
    config.data.image_size = 128
    config.data.batch_size = 64
    config.train.num_steps = 12_000
    return config
