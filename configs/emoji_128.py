"""The embedded model at 128x128, where a GPU trains it: the transformer of `emoji.py` on 8x8 latents.

Hardware   one GPU; not run yet (benchmarks/gpu_session.py does).
Command    python train.py --config=configs/emoji_128.py --workdir=runs/emoji_128 --config.autoencoder_path=runs/emoji_autoencoder_128
"""

from configs import emoji


def get_config():
    config = emoji.get_config()
    config.dtype = "bfloat16"
    config.model.sample_size = 8
    config.model.in_channels = config.model.out_channels = 32
    config.data.image_size = 128
    config.data.batch_size = 256
    config.train.num_steps = 20_000
    config.train.sample_every = 2_000
    config.train.checkpoint_every = 2_000
    return config
