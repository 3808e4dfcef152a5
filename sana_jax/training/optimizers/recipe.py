"""From the `optimizer` section of a config to an optax transformation and its learning-rate schedule."""

import math
from collections.abc import Sequence

import jax
import optax
from absl import logging

from sana_jax.parallel.sharding import path_names
from sana_jax.training.optimizers.came import scale_by_came
from sana_jax.training.optimizers.eight_bit import eight_bit
from sana_jax.training.optimizers.muon import scale_by_muon_and_adam


def make_schedule(config, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant, or cosine or linear decay to `final_fraction` of the peak at `num_steps`.

    Where there is a decay, the warm-up takes at most a tenth of the run, so that a run cut short to try something out
    still has all three parts.

    Args:
      config: learning_rate, warmup_steps, schedule, final_fraction.
      num_steps: length of the run, warm-up included.

    Raises:
      ValueError: unknown schedule.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule != "constant" and warmup > num_steps // 10:
        logging.warning("optimizer.warmup_steps=%d: %d of %d steps are taken.", warmup, num_steps // 10, num_steps)
        warmup = num_steps // 10
    decay_steps = max(1, num_steps - warmup)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule in ("cosine", "linear"):
        if config.schedule == "cosine":
            after = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_fraction)
        else:
            after = optax.linear_schedule(peak, peak * config.final_fraction, decay_steps)
    else:
        raise ValueError(f"optimizer.schedule={config.schedule!r} is not one of constant, cosine, linear.")
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config, num_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clipping by global norm, AdamW, CAME or Muon, decoupled weight decay, schedule.

    Every parameter decays, as in PyTorch, whose running statistics are none. AdamW and CAME also with their state in
    eight bits.

    Returns:
      The transformation and the schedule it follows (step -> learning rate), for the log.

    Raises:
      ValueError: unknown optimizer, the wrong number of betas for it, or one that is no average's.
    """
    numbers = {"adamw": 2, "adamw8bit": 2, "came": 3, "came8bit": 3, "muon": 2}
    if config.name not in numbers:
        raise ValueError(f"optimizer.name={config.name!r} is not one of {', '.join(numbers)}.")
    if len(config.betas) != numbers[config.name]:
        raise ValueError(
            f"optimizer.betas={tuple(config.betas)} has {len(config.betas)} values, {config.name} takes "
            f"{numbers[config.name]}. Use {(0.9, 0.999, 0.9999)[: numbers[config.name]]}."
        )
    for beta in config.betas:
        if not isinstance(beta, int | float) or not 0 <= beta < 1:
            raise ValueError(f"optimizer.betas={tuple(config.betas)}: {beta!r} is no number from 0 to below 1.")
    schedule = make_schedule(config, num_steps)
    if config.name in ("adamw", "adamw8bit"):
        direction = optax.scale_by_adam(*config.betas, eps=config.adamw_eps)
    elif config.name in ("came", "came8bit"):
        direction = scale_by_came(*config.betas, eps=check_came_eps(config.came_eps), clip_threshold=config.came_clip)
    else:
        direction = scale_by_muon_and_adam(config.muon_rms, *config.betas, adam_eps=config.adamw_eps)
    if config.name.endswith("8bit"):
        direction = eight_bit(direction)
    return (
        optax.chain(
            optax.clip_by_global_norm(config.grad_clip_norm) if config.grad_clip_norm > 0 else optax.identity(),
            direction,
            add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule),
        ),
        schedule,
    )


def check_came_eps(eps: Sequence[float]) -> tuple[float, float]:
    """Returns `optimizer.came_eps`; raises ValueError where they are not two numbers above 0."""
    if len(eps) != 2 or not all(isinstance(value, int | float) and 0 < value < math.inf for value in eps):
        raise ValueError(f"optimizer.came_eps={tuple(eps)} are not two numbers above 0, as (1e-30, 1e-16).")
    return tuple(eps)


def add_decayed_weights(weight_decay: float) -> optax.GradientTransformation:
    """optax's, but for `FrozenBatchNorm`'s running statistics, which no gradient reaches. Has no state either."""

    def one(path, update, param):
        return update if path_names(path)[-1] in ("mean", "var") else update + weight_decay * param

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(one, updates, params))
