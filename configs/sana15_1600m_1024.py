"""SANA-1.5 1.6B, 1024x1024: RMSNorm on queries and keys (SANA-1.5, section 2).

Hardware   a multiple of 8 devices with 80 GB; fewer than 64 may need train.accumulate_steps (published.py). Not yet run: shapes are
           tested, the step time is not measured.
Command    python train.py --config=configs/sana15_1600m_1024.py --workdir=runs/sana15_1600m_1024
Expected   the paper reports FID 5.70, CLIP 29.12, GenEval 0.82, fine-tuning on GenEval-style prompts included.
"""

from configs.published import published
from sana_jax.models import presets


def get_config():
    return published(presets.sana15_1600m(sample_size=32), batch_size=1024, num_steps=200_000)
