"""A LoRA of SANA-1.6B at 1024x1024: its attentions learn a style or a subject from some tens to thousands of pictures.

Hardware   one GPU: 11.1 GB a step, 12.3 where 8 pictures are drawn (H100's compiler, --aot=h100 --aot_show; not run)
Command    python train.py --config=configs/sana_1600m_1024_lora.py --workdir=runs/lora --config.data.path=data/pictures
           python sample.py --model=pretrained/sana --lora=runs/lora --prompt=... --out=lora.png
           pretrained/sana and data/pictures are made as in published.py. Another model: its own config with
           --config.init_from, --config.lora.rank=16, --config.mesh.fsdp=1 and what stands below.
Expected   train_loss (always the same pictures, noises and levels) below that of the first steps; nothing was published of it.
"""

from configs.published import published
from sana_jax.models import presets


def get_config():
    config = published(presets.sana_1600m(sample_size=32), batch_size=8, num_steps=2000, fsdp=1)
    config.init_from = "pretrained/sana"
    config.lora.rank = 16
    config.data.aspect_ratios = (1.0,)
    config.train.cache_latents = True
    config.train.checkpoint_every = 500
    config.train.export_dtype = "float32"  # 46 MB
    config.optimizer.name = "adamw"
    config.optimizer.betas = (0.9, 0.999)
    config.optimizer.warmup_steps = 100
    config.optimizer.grad_clip_norm = 1.0
    return config
