"""SANA-1.6B, 2048x2048: continues sana_1600m_1024 with a position table (SANA, section 3).

Hardware   a multiple of 8 devices with 80 GB; fewer than 64 may need train.accumulate_steps (published.py). Not yet run: shapes are
           tested, the step time is not measured.
Command    python train.py --config=configs/sana_1600m_2k.py --workdir=runs/sana_1600m_2k \
               --config.init_from=runs/sana_1600m_1024
Expected   converges in about 10,000 steps (paper); no FID published.
"""

from configs.published import published
from sana_jax.models import presets


def get_config():
    return published(presets.sana_1600m(sample_size=64), batch_size=256, num_steps=10_000)
