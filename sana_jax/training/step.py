"""One update: gradients, clipping, optimizer, average, measurements."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from sana_jax.training.ema import ema_decay, update_ema
from sana_jax.training.state import PyTree, TrainState


def make_step(
    loss: Callable[..., tuple[jax.Array, dict]],
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    decay: float,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict]]:
    """The function to jit: (state, frozen, batch) -> (state, metrics).

    Args:
      loss: of a `Task`. `frozen` are weights that do not train; they are an argument, not a closure, so that they are
        sharded and not compiled in.
      tx, schedule: of `make_optimizer`.
      seed: the step's key is fold_in(key(seed), step), so that a resumed run draws what the whole run would have drawn.
      decay: of the average; read only where the state has one.
      accumulate: parts of the batch whose gradients are computed one after the other and averaged.
      skip_nonfinite: where loss or gradient is not finite, keep the state but for its step, and say so in the metric
        "skipped". The schedule counts the updates that were made.
    """

    def step(state: TrainState, frozen: PyTree, batch: PyTree):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        keys = jax.random.split(key, jax.tree.leaves(batch)[0].shape[0])
        grads, metrics = mean_gradient(loss, state.params, frozen, batch, keys, state.step, parts=accumulate)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, ema_decay(state.step, decay)) if state.ema else state.ema
        new = TrainState(state.step + 1, params, ema, opt_state)
        metrics |= {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        if skip_nonfinite:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            kept = state._replace(step=new.step)
            new = jax.tree.map(lambda new, kept: jnp.where(finite, new, kept), new, kept)
            metrics["skipped"] = ~finite
        metrics |= {"param_norm": optax.tree.norm(new.params), "learning_rate": schedule(state.updates_made())}
        return new, metrics

    return step


def mean_gradient(loss, params: PyTree, frozen: PyTree, batch: PyTree, keys: Key[Array, " B"], step, *, parts: int):
    """(gradient of the batch's mean loss, metrics), from `parts` equal parts of the batch, one after the other.

    Sums are float32, and the result is that of the whole batch but for rounding, because each picture has its own key. Part
    i is pictures i, i + parts, ...: every device takes part in every one with pictures that it already has. Metrics are
    averaged too; what is no mean over pictures (a standard deviation) is that of a part.
    """
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        return gradient(params, frozen, batch, keys, step)

    def split(x):
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(params, frozen, *part, step)), None

    shapes = jax.eval_shape(gradient, params, frozen, batch, keys, step)  # a part's are the same: all are means
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    total, _ = jax.lax.scan(add, zeros, jax.tree.map(split, (batch, keys)))
    return jax.tree.map(lambda x: x / parts, total)


def split_each(keys: Key[Array, " B"], count: int) -> Key[Array, "count B"]:
    """`count` new keys from each of `keys`."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)
