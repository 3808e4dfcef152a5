"""SANA-0.6B, 1024x1024: continues sana_600m_512 (SANA, section 3).

Hardware   a multiple of 8 devices with 80 GB; fewer than 64 may need train.accumulate_steps (published.py). Not yet run: shapes are
           tested, the step time is not measured.
Command    python train.py --config=configs/sana_600m_1024.py --workdir=runs/sana_600m_1024 \
               --config.init_from=runs/sana_600m_512
Expected   the paper reports FID 5.81, CLIP 28.36, GenEval 0.64; the number of steps at this stage is not published.
"""

from configs.published import published
from sana_jax.models import presets


def get_config():
    return published(presets.sana_600m(sample_size=32), batch_size=4096, num_steps=200_000, flow_shift=4.0)
