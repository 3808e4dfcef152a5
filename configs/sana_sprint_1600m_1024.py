"""SANA-Sprint 1.6B, 1024x1024: one to four steps, distilled by consistency and a critic (SANA-Sprint, section 3).

Hardware   a multiple of 8 devices with 80 GB; fewer than 32 may need train.accumulate_steps (published.py). Not yet run: shapes are
           tested, the step time is not measured.
Command    python train.py --config=configs/sana_sprint_1600m_1024.py --workdir=runs/sprint
           after sana_sprint_1600m_1024_teacher.py; for 0.6B --config.distillation.critic_blocks="(2,8,14,20,27)" with its model.
Expected   the paper reports FID 6.50 and GenEval 0.77 at two steps.
"""

from configs.published import published
from sana_jax.models import presets


def get_config():
    config = published(presets.sprint_1600m(sample_size=32), batch_size=512, num_steps=20_000)
    config.distillation.teacher = "runs/sprint_teacher"
    config.optimizer.learning_rate = 2e-6
    config.optimizer.warmup_steps = 5000
    config.train.skip_nonfinite = 10
    config.sample.num_inference_steps = 2
    return config
