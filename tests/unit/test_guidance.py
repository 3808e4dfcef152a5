"""Classifier-free guidance on a model that is plain arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion.guidance import classifier_free_guidance, guidance_interval

LATENTS = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))
TEXT = {"features": jnp.array([1.0, 2.0]), "mask": jnp.array([1.0, 0.5])}
NULL = {"features": jnp.array([-1.0, 4.0]), "mask": jnp.array([1.0, 1.0])}


def model(latents, timesteps, condition):
    strength = condition["features"] * condition["mask"] + timesteps / 1000
    return latents * strength[:, None, None, None]


def test_guidance_extrapolates_from_the_unconditional_velocity():
    velocity_fn = classifier_free_guidance(model, TEXT, NULL, 4.5)
    t = jnp.full((2,), 250.0)
    null, text = np.array([-0.75, 4.25]), np.array([1.25, 1.25])
    expected = np.asarray(LATENTS) * (null + 4.5 * (text - null))[:, None, None, None]
    np.testing.assert_allclose(velocity_fn(LATENTS, t), expected, rtol=1e-5)


def test_scale_1_is_the_conditional_velocity():
    t = jnp.full((2,), 250.0)
    guided = classifier_free_guidance(model, TEXT, NULL, 1.0)(LATENTS, t)
    np.testing.assert_allclose(guided, model(LATENTS, t, TEXT), rtol=1e-5, atol=1e-6)


def test_both_halves_are_one_call_of_the_model():
    batches = []

    def counting(latents, timesteps, condition):
        batches.append((latents.shape[0], timesteps.shape[0], condition["mask"].shape[0]))
        return model(latents, timesteps, condition)

    classifier_free_guidance(counting, TEXT, NULL, 4.5)(LATENTS, jnp.zeros(2))
    assert batches == [(4, 4, 4)]


def test_pictures_of_one_prompt_share_its_condition():
    latents = jax.random.normal(jax.random.key(1), (6, 3, 3, 1))
    t = jnp.full((6,), 250.0)

    def shared(latents, timesteps, condition):
        pictures = latents.shape[0] // condition["mask"].shape[0]
        return model(latents, timesteps, {name: jnp.repeat(x, pictures) for name, x in condition.items()})

    each = [{name: jnp.repeat(x, 3) for name, x in tree.items()} for tree in (TEXT, NULL)]
    for interval in (guidance_interval(0.0, 1.0), guidance_interval(0.5, 1.0)):
        expected = classifier_free_guidance(model, *each, 4.5, interval)(latents, t)
        found = classifier_free_guidance(shared, TEXT, NULL, 4.5, interval)(latents, t)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interval,calls", [((0.0, 1.0), [4]), ((0.5, 1.0), [4, 2])])
def test_a_condition_is_prepared_once_for_all_steps(interval, calls):
    prepared = []

    def prepare(condition):
        prepared.append(condition["mask"].shape[0])
        return condition | {"features": 2 * condition["features"]}

    def halving(latents, timesteps, condition):
        return model(latents, timesteps, condition | {"features": condition["features"] / 2})

    velocity_fn = classifier_free_guidance(halving, TEXT, NULL, 4.5, guidance_interval(*interval), prepare)
    expected = classifier_free_guidance(model, TEXT, NULL, 4.5, guidance_interval(*interval))
    for timestep in (100.0, 700.0):
        t = jnp.full((2,), timestep)
        np.testing.assert_allclose(velocity_fn(LATENTS, t), expected(LATENTS, t), rtol=1e-6)
    assert prepared == calls


@pytest.mark.parametrize(
    "timestep,inside", [(100.0, False), (300.0, True), (500.0, True), (700.0, True), (701.0, False)]
)
def test_guidance_acts_inside_the_interval_only(timestep, inside):
    t = jnp.full((2,), timestep)
    velocity_fn = classifier_free_guidance(model, TEXT, NULL, 4.5, interval=guidance_interval(0.3, 0.7))
    guided = classifier_free_guidance(model, TEXT, NULL, 4.5)(LATENTS, t)
    np.testing.assert_allclose(
        jax.jit(velocity_fn)(LATENTS, t), guided if inside else model(LATENTS, t, TEXT), rtol=1e-5, atol=1e-6
    )


def test_pictures_that_are_not_equally_many_of_each_prompt_are_refused():
    with pytest.raises(ValueError, match="2 prompts do not divide 1 latents"):
        classifier_free_guidance(model, TEXT, NULL, 4.5)(LATENTS[:1], jnp.zeros(1))


def test_the_scale_may_change_without_a_new_compilation():
    traces = []

    @jax.jit
    def velocity(scale):
        traces.append(1)
        return classifier_free_guidance(model, TEXT, NULL, scale)(LATENTS, jnp.zeros(2))

    assert not np.allclose(velocity(2.0), velocity(3.0)) and len(traces) == 1
