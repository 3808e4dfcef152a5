"""Values of a config that are refused before a run begins."""

import pytest

from configs import base
from sana_jax.training.settings import check_ranges


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("train.num_steps", -5, "train.num_steps=-5: use 0 or more"),
        ("train.log_every", 0, "train.log_every=0: use 1 or more"),
        ("train.checkpoint_every", 0, "train.checkpoint_every=0: use 1 or more"),
        ("train.keep_checkpoints", 0, "train.keep_checkpoints=0: use 1 or more"),
        ("train.keep_every", 1500, "train.keep_every=1500 is not a multiple of train.checkpoint_every=1000.*use 2000"),
        ("train.class_dropout_prob", 1.5, "train.class_dropout_prob=1.5: use from 0 to 1"),
        ("train.export_dtype", "bf16", "train.export_dtype='bf16' is not one of float32, float16, bfloat16"),
        ("train.profile_steps", (4, 3), "train.profile_steps=.4, 3. is not .first, last. with 1 <= first <= last"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate=nan: use 0 or more"),
        ("optimizer.grad_clip_norm", -1.0, "optimizer.grad_clip_norm=-1.0: use 0 or more"),
        ("ema.decay", 1.5, "ema.decay=1.5: use from 0 to 1"),
        ("sample.num_inference_steps", 0, "sample.num_inference_steps=0: use 1 or more"),
    ],
)
def test_a_value_that_would_be_of_no_use_later_is_refused_at_once(name, value, message):
    config = base.get_config()
    check_ranges(config)
    section, field = name.split(".")
    config[section][field] = value
    with pytest.raises(ValueError, match=message):
        check_ranges(config)
