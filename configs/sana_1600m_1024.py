"""SANA-1.6B, 1024x1024: continues sana_1600m_512 (SANA, section 3).

Hardware   v5e:16x16 or v5p:8x8x8 by the compiler's count (10.4 and 8.5 GB a chip; README), or a multiple of 8 devices with
           80 GB, of which fewer than 64 may need train.accumulate_steps (published.py). Not yet run.
Command    python train.py --config=configs/sana_1600m_1024.py --workdir=runs/sana_1600m_1024 \
               --config.init_from=runs/sana_1600m_512
Expected   the paper reports FID 5.76, CLIP 28.67, GenEval 0.66; the number of steps at this stage is not published.
"""

from configs.published import published
from sana_jax.models import presets


def get_config():
    return published(presets.sana_1600m(sample_size=32), batch_size=4096, num_steps=200_000)
