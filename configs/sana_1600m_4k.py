"""SANA-1.6B, 4096x4096: continues sana_1600m_2k, flow shift 6, position table at twice the scale (the configs of NVlabs/Sana).

Hardware   v5p:4x4x4 with mesh.fsdp=4 and mesh.seq=4 by the compiler's count (13.7 GB a chip with 64 pictures in a step,
           README; the 256 here in four parts: train.accumulate_steps=4), or a multiple of 8 devices with 80 GB, likewise in parts.
           Not yet run.
Command    python train.py --config=configs/sana_1600m_4k.py --workdir=runs/sana_1600m_4k \
               --config.init_from=runs/sana_1600m_2k
Expected   converges in about 10,000 steps (paper); no FID published.
"""

from configs.published import published
from sana_jax.models import presets


def get_config():
    return published(presets.sana_1600m(sample_size=128), batch_size=256, num_steps=10_000, flow_shift=6.0)
