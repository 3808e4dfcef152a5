"""One update: gradients, clipping, optimizer, average, measurements."""

from collections.abc import Callable

import jax
import optax

from sana_jax.training.ema import ema_decay, update_ema
from sana_jax.training.state import PyTree, TrainState


def make_step(
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    decay: float,
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, jax.Array]]]:
    """The function to jit: (state, frozen, batch) -> (state, metrics).

    Args:
      loss: (params, frozen, batch, key, step) -> (scalar, metrics). `frozen` are weights that do not train; they are an
        argument, not a closure, so that they are sharded and not compiled in.
      tx, schedule: of `make_optimizer`.
      seed: the step's key is fold_in(key(seed), step), so that a resumed run draws what the whole run would have drawn.
      decay: of the average; read only where the state has one.
    """

    def step(state: TrainState, frozen: PyTree, batch: PyTree):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, frozen, batch, key, state.step)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, ema_decay(state.step, decay)) if state.ema else state.ema
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step
