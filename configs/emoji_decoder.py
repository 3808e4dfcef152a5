"""The embedded model's decoder, trained on: it learns to forgive the errors of generated latents; the encoder stays.

Hardware   2 CPU cores, 10 minutes.
Command    python train.py --config=configs/emoji_decoder.py --workdir=runs/emoji_decoder --config.init_from=runs/emoji_autoencoder
"""

from configs import emoji_autoencoder


def get_config():
    config = emoji_autoencoder.get_config()
    config.freeze_encoder = True
    config.latent_noise = 0.25
    config.train.num_steps = 1_500
    config.optimizer.learning_rate = 1e-3
    config.ema.decay = 0.995
    return config
