"""A ControlNet of SANA-1.6B at 1024x1024: copies of its first seven blocks learn to draw by edges, depth or poses.

Hardware   v5e:2x4, or eight devices with 16 GB: 9.6 GB a chip with 16 pictures each (compiler's estimate, --aot=v5e:2x4; not run)
Command    python -m sana_jax.data build folder --control --heldout=0.01 --input=PICTURES --output=data/guided
           python train.py --config=configs/sana_1600m_1024_controlnet.py --workdir=runs/controlnet --config.data.path=data/guided
           python sample.py --model=pretrained/sana --controlnet=runs/controlnet --control_image=... --prompt=... --out=guided.png
           PICTURES has X.png, X.txt, X.control.png; pretrained/sana is made as in published.py. To go on from a public one:
           --config.controlnet.init_from=FILE.pth --config.controlnet.wiring=original. Another model: its own config with
           --config.init_from, --config.controlnet.num_layers=7 and what stands below.
Expected   heldout_loss below that of the first steps; nothing was published of its training. Captions are dropped with p = 0.5, as in
           the ControlNet paper, so that it learns to see the picture that guides.
"""

from configs.published import published
from sana_jax.models import presets


def get_config():
    config = published(presets.sana_1600m(sample_size=32), batch_size=128, num_steps=20_000)
    config.init_from = "pretrained/sana"
    config.controlnet.num_layers = 7
    config.data.aspect_ratios = (1.0,)
    config.train.cache_latents = True
    config.train.class_dropout_prob = 0.5
    config.optimizer.name = "adamw"
    config.optimizer.betas = (0.9, 0.999)
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 500
    config.optimizer.grad_clip_norm = 1.0
    config.sample.split = "heldout"
    return config
