"""SANA-0.6B, 512x512: first stage of the cascade, from random weights (SANA, section 3).

Hardware   a multiple of 8 devices with 80 GB; fewer than 64 may need train.accumulate_steps (published.py). Not yet run: shapes are
           tested, the step time is not measured.
Command    python train.py --config=configs/sana_600m_512.py --workdir=runs/sana_600m_512
Expected   after more than 200,000 steps the paper reports FID 5.67, CLIP 27.92, GenEval 0.64.
"""

from configs.published import published
from sana_jax.models import presets


def get_config():
    return published(presets.sana_600m(sample_size=16), batch_size=8192, num_steps=200_000)
