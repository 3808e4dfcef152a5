"""What the published SANA and SANA-1.5 runs have in common (the configs of NVlabs/Sana).

CAME at 1e-4 after 2,000 steps of warm-up, gradients clipped to 0.1, no average of the weights, captions dropped with
p = 0.1, CHI prompt of 300 tokens, frozen Gemma-2 and DC-AE, every block rematerialised.

Deviations:
* 9 aspect ratios of the 40 that the published runs had: each takes the compiler as long as the first (all are in
  sana_jax/aspect_ratios.py; squares alone: --config.data.aspect_ratios="(1.0,)");
* bf16 where some of them used fp16 with loss scaling (0.6B, and 512 pixels); exports, from which the next size goes on, are bf16 too;
* text encoder and autoencoder run within the step;
* texts are prepared as diffusers samples (captions in lower case, the instruction in its quotation marks, a dropped caption with its
  own mask), so that a run can be sampled there. As the published runs had them:
    --config.text_encoder.lower_case=False --config.text_encoder.instruction=original --config.text_encoder.null_mask=prompt

Autoencoder and text encoder come from a downloaded model in diffusers layout:
    hf download Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers --local-dir pretrained/sana
Pictures come from a folder made by `python -m sana_jax.data build folder --input PICTURES --output data/pictures`; with
`--min_score=22` where pictures whose captions fit badly are left out, as for the 4.8B.
"""

import dataclasses

from configs import base
from sana_jax.models.transformer import TransformerConfig


def published(model: TransformerConfig, *, batch_size: int, num_steps: int, flow_shift: float = 3.0, fsdp: int = 8):
    """A config for `model` at 32 * sample_size pixels.

    Args:
      model: a preset.
      batch_size: global; the published batch per GPU times 64 GPUs where it is not stated. On fewer devices
        `--config.train.accumulate_steps=N` works through it in N parts, one after the other; benchmarks/README.md has what 16
        pictures of 1024 pixels a device take.
      num_steps: of the run; "more than" this in the papers.
      flow_shift: 3.0 but for 0.6B at 1024 (4.0) and 4K (6.0).
      fsdp: devices that share one copy of weights and optimizer state.
    """
    config = base.get_config()
    config.seed = 1
    config.dtype = "bfloat16"
    config.model = base.fields(dataclasses.replace(model, remat="full"))
    config.autoencoder_path = "pretrained/sana"
    config.autoencoder_dtype = "float32"
    config.text_encoder.mode = "frozen"
    config.text_encoder.path = "pretrained/sana"
    config.text_encoder.use_instruction = True
    config.text_encoder.max_length = 300

    config.data.path = "data/pictures"
    config.data.image_size = 32 * model.sample_size
    config.data.aspect_ratios = (0.5, 0.57, 0.68, 0.78, 1.0, 1.29, 1.46, 1.75, 2.0)
    config.data.batch_size = batch_size
    config.data.threads = 16
    config.data.prefetch = 2  # 64 pictures of 1024 pixels are 0.8 GB
    config.sample.split = "train"  # "heldout" for a set that was built with --heldout=0.01
    config.sample.num_images = 8

    config.mesh.fsdp = fsdp
    config.train.num_steps = num_steps
    config.train.flow_shift = flow_shift
    config.train.sample_every = 500
    config.train.checkpoint_every = 1000
    config.train.export_dtype = "bfloat16"

    config.optimizer.name = "came"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.betas = (0.9, 0.999, 0.9999)
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.0
    config.optimizer.grad_clip_norm = 0.1
    config.ema.decay = 0.0
    return config
