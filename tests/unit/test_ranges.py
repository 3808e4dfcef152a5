"""Values of a config that are refused before a run begins."""

import pytest

from configs import base
from sana_jax.training.ranges import check_ranges


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("dtype", "float16", "dtype='float16' holds no gradient below 6e-8.* Use bfloat16 or float32"),
        ("train.num_steps", -5, "train.num_steps=-5: use 0 or more"),
        ("train.log_every", 0, "train.log_every=0: use 1 or more"),
        ("train.checkpoint_every", 0, "train.checkpoint_every=0: use 1 or more"),
        ("train.keep_checkpoints", 0, "train.keep_checkpoints=0: use 1 or more"),
        ("train.keep_every", 1500, "train.keep_every=1500 is not a multiple of train.checkpoint_every=1000.*use 2000"),
        ("train.class_dropout_prob", 1.5, "train.class_dropout_prob=1.5: use from 0 to 1"),
        ("train.export_dtype", "bf16", "train.export_dtype='bf16' is not one of float32, float16, bfloat16"),
        ("train.profile_steps", (4, 3), "train.profile_steps=.4, 3. is not .first, last. with 1 <= first <= last"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate=nan: use 0 or more"),
        ("seed", -1, "seed=-1: use from 0 to 4294967295"),
        ("gan.weight", -1.0, "gan.weight=-1.0: use 0 or more"),
        ("gan.depth", 0, "gan.depth=0: use 1 or more"),
        ("text_encoder.max_length", 0, "text_encoder.max_length=0: use 2 or more"),
        ("text_encoder.null_mask", "caption", "text_encoder.null_mask='caption' is not one of own, prompt"),
        ("text_encoder.instruction", "mine", "text_encoder.instruction='mine' is not one of diffusers, original"),
        ("train.flow_shift", 0.0, "train.flow_shift=0.0: use more than 0"),
        ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate=inf: use 0 or more, but not inf"),
        ("optimizer.warmup_steps", -5, "optimizer.warmup_steps=-5: use 0 or more"),
        ("optimizer.final_fraction", 2.0, "optimizer.final_fraction=2.0: use from 0 to 1"),
        ("optimizer.adamw_eps", 0.0, "optimizer.adamw_eps=0.0: use more than 0"),
        ("optimizer.muon_rms", -1.0, "optimizer.muon_rms=-1.0: use more than 0"),
        ("optimizer.came_clip", 0.0, "optimizer.came_clip=0.0: use more than 0"),
        ("train.logit_std", 0.0, "train.logit_std=0.0: use more than 0"),
        ("train.logit_mean", 40.0, "train.logit_mean=40.0: use from -10 to 10"),
        ("data.max_shift", -1, "config.data: max_shift=-1 is not from 0 to 511"),
        ("data.aspect_ratios", (0.3,), "config.data: aspect_ratios has 0.3, .*The nearest are 0.28 and 0.32"),
        ("sample.prompts", (3,), "sample.prompts has 3, which is no text"),
        ("text_encoder.mode", "frozen", "mode='frozen' and text_encoder.path=''. Use text_encoder.path=FOLDER"),
        ("optimizer.grad_clip_norm", -1.0, "optimizer.grad_clip_norm=-1.0: use 0 or more"),
        ("ema.decay", 1.5, "ema.decay=1.5: use from 0 to 1"),
        ("sample.num_inference_steps", 0, "sample.num_inference_steps=0: use 1 or more"),
    ],
)
def test_a_value_that_would_be_of_no_use_later_is_refused_at_once(name, value, message):
    config = base.get_config()
    check_ranges(config)
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=message):
        check_ranges(config)


@pytest.mark.parametrize(
    "task,name,value,message",
    [
        (
            "transformer",
            "freeze_encoder",
            True,
            "freeze_encoder=True is not read with task='transformer'. Leave it at F",
        ),
        ("transformer", "gan.weight", 0.1, "gan.weight=0.1 is not read with task='transformer'"),
        ("transformer", "reconstruction", "l2", "reconstruction='l2' is not read with task='transformer'"),
        ("transformer", "text_encoder.path", "x", "text_encoder.path='x' is not read with text_encoder.mode='train'"),
        ("autoencoder", "train.cache_latents", True, "train.cache_latents=True is not read with task='autoencoder'"),
        ("autoencoder", "train.flow_shift", 2.0, "train.flow_shift=2.0 is not read with task='autoencoder'"),
        ("autoencoder", "train.logit_mean", 0.5, "train.logit_mean=0.5 is not read with task='autoencoder'"),
        ("autoencoder", "gan.width", 32, "gan.width=32 is not read with gan.weight=0"),
        ("autoencoder", "perceptual", "lpips", "perceptual='lpips' is not read with perceptual_weight=0"),
        ("transformer", "text_encoder.instruction", "original", "instruction='original' .*use_instruction=False"),
        ("transformer", "sample.prompts", ("x",) * 33, "sample.prompts has 33 texts for sample.num_images=32"),
        ("autoencoder", "mesh.seq", 4, "mesh.seq=4 splits nothing when an autoencoder is trained. Use .* mesh.data"),
    ],
)
def test_a_value_that_the_task_does_not_read_is_refused(task, name, value, message):
    config = base.get_config()
    config.task = task
    check_ranges(config)
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=message):
        check_ranges(config)
