"""One training step: accumulated gradients, skipped updates, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sana_jax.training.metrics import Binned
from sana_jax.training.state import init_state
from sana_jax.training.step import make_step


def noisy_loss(params, frozen, batch, keys, step):
    """Linear regression on noisy inputs; a picture's noise comes from its own key."""
    x = batch["x"] + jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    losses = jnp.square(jnp.tanh(x @ params["w"]) - batch["y"])
    metrics = {"loss": jnp.mean(losses), "by_size": Binned(losses[None].sum(1), jnp.full(1, float(len(losses))))}
    return metrics["loss"], metrics


def batch(size=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": jnp.asarray(rng.normal(size=(size, 3)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=size), jnp.float32),
    }


def stepper(**options):
    tx = optax.adam(0.1)
    step = jax.jit(make_step(noisy_loss, tx, lambda step: 0.1, seed=0, decay=0.9, **options))
    return step, init_state({"w": jnp.asarray([0.3, -0.2, 0.5])}, tx, with_ema=True)


def run(batches, **options):
    step, state = stepper(**options)
    for each in batches:
        state, metrics = step(state, {}, each)
    return state, metrics


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_steps_are_the_steps_of_the_whole_batch_noise_and_average_included(parts):
    batches = [batch(seed=n) for n in range(5)]
    (whole, metrics), (accumulated, ours) = run(batches), run(batches, accumulate=parts)
    assert jax.tree.structure(whole) == jax.tree.structure(accumulated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), accumulated, whole)
    assert float(ours["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    np.testing.assert_allclose(ours["by_size"].sums / ours["by_size"].counts, metrics["loss"], rtol=1e-5)


def test_gradients_of_parts_are_added_up_in_float32():
    def loss(params, frozen, batch, keys, step):
        value = jnp.mean(batch["x"]) * params["w"][0]
        return value.astype(jnp.float32), {"loss": value.astype(jnp.float32)}

    tx = optax.sgd(1.0)
    step = make_step(loss, tx, lambda step: 1.0, seed=0, decay=0.0, accumulate=1024)
    state = init_state({"w": jnp.zeros(1, jnp.bfloat16)}, tx, with_ema=False)
    _, metrics = jax.jit(step)(state, {}, {"x": jnp.ones((1024, 1), jnp.bfloat16)})
    assert float(metrics["grad_norm"]) == 1.0  # a bfloat16 sum of ones stays at 256


def test_a_step_that_is_not_finite_leaves_everything_but_the_step_as_it_was():
    step, state = stepper(skip_nonfinite=True)
    state, metrics = step(state, {}, batch())
    assert not metrics["skipped"]
    poisoned = batch() | {"y": jnp.full(8, jnp.inf)}
    after, metrics = step(state, {}, poisoned)
    assert metrics["skipped"] and int(after.step) == int(state.step) + 1
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=state.step), state)
    assert np.isfinite(metrics["param_norm"])


def test_the_learning_rate_said_is_the_one_used_after_an_update_was_skipped():
    def loss(params, frozen, batch, keys, step):
        value = jnp.sum(params["w"] * batch["x"])
        return value, {"loss": value}

    def schedule(count):
        return 1.0 + count

    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(schedule))
    step = jax.jit(make_step(loss, tx, schedule, seed=0, decay=0.0, skip_nonfinite=True))
    state = init_state({"w": jnp.zeros(1)}, tx, with_ema=False)
    said = []
    for value in (1.0, np.nan, np.nan, 1.0):
        before = state.params["w"]
        state, metrics = step(state, {}, {"x": jnp.full((1, 1), value)})
        if not metrics["skipped"]:
            said.append(float(metrics["learning_rate"]))
            np.testing.assert_allclose(before - state.params["w"], said[-1], rtol=1e-4)
    assert said == [1.0, 2.0]


def test_skipping_changes_no_finite_run():
    batches = [batch(seed=n) for n in range(3)]
    jax.tree.map(np.testing.assert_array_equal, run(batches)[0], run(batches, skip_nonfinite=True)[0])


def test_an_accumulated_step_is_skipped_for_one_bad_part():
    step, state = stepper(skip_nonfinite=True, accumulate=4)
    bad = batch()
    after, metrics = step(state, {}, bad | {"y": bad["y"].at[5].set(jnp.nan)})
    assert metrics["skipped"]
    np.testing.assert_array_equal(after.params["w"], state.params["w"])
