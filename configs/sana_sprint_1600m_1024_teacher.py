"""The teacher of SANA-Sprint 1.6B: SANA 1.6B with continuous time and RMSNorm on queries and keys (SANA-Sprint, section 3.2).

Hardware   a multiple of 8 devices with 80 GB; fewer than 64 may need train.accumulate_steps (published.py). Not yet run: shapes are
           tested, the step time is not measured.
Command    python train.py --config=configs/sana_sprint_1600m_1024_teacher.py --workdir=runs/sprint_teacher
           pretrained/sana and data/pictures are made as in published.py.
Expected   train_loss (always the same pictures, noises and levels) as low as the model's before: nothing new is learnt.
"""

from configs.published import published
from sana_jax.models import presets


def get_config():
    model = presets.sprint_1600m(sample_size=32, guidance_embeds=False)
    config = published(model, batch_size=1024, num_steps=5_000)
    config.init_from = "pretrained/sana"
    config.init_adapts = ("timestep_scale", "integer_timesteps", "qk_norm")
    config.optimizer.learning_rate = 2e-5
    return config
