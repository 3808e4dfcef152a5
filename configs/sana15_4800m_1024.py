"""SANA-1.5 4.8B, 1024x1024: 60 blocks, the first 18 of them from the 1.6B (SANA-1.5, section 2).

The others change nothing at first. The paper grows it so, without the last two blocks of the 1.6B, in 60 % fewer steps than from
random weights. As there, CAME's first moment is kept in eight bits: 4.8 GB of optimizer state in place of 18.9 (AdamW in float32:
37.8).

Hardware   v5p:4x4x4 by the compiler's count (18.2 GB a chip; README), or a multiple of 16 devices with 80 GB
           (two nodes of 8 GPUs, which fsdp spans). Not yet run.
Command    python train.py --config=configs/sana15_4800m_1024.py --workdir=runs/sana15_4800m_1024
           It starts from the run of sana15_1600m_1024.py; from random weights: --config.init_from= --config.init_blocks='()'
           Fewer blocks again: README.md beside this file.
Expected   after more than 100,000 steps the paper reports FID 5.42, CLIP 29.16, GenEval 0.72 (before fine-tuning).
"""

from configs.published import published
from sana_jax.models import presets


def get_config():
    config = published(presets.sana15_4800m(sample_size=32), batch_size=1024, num_steps=100_000, fsdp=16)
    config.init_from = "runs/sana15_1600m_1024"
    config.init_blocks = tuple(range(18))
    config.optimizer.name = "came8bit"
    return config
