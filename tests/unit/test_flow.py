"""Flow matching: levels, timesteps, interpolant, velocity, loss; restated in NumPy or by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana_jax.diffusion import flow


@given(st.floats(0.0, 0.999), st.floats(0.5, 12.0))
def test_shift_multiplies_the_noise_to_signal_ratio(sigma, shift):
    shifted = flow.shift_sigma(sigma, shift)
    np.testing.assert_allclose(shifted / (1 - shifted), shift * sigma / (1 - sigma), rtol=1e-9, atol=1e-12)


def test_shift_keeps_zero_and_one():
    np.testing.assert_array_equal(flow.shift_sigma(np.array([0.0, 1.0]), 6.0), [0.0, 1.0])


def test_training_table_is_the_shifted_thousandths_with_truncated_timesteps():
    sigmas, timesteps = flow.training_levels(3.0)
    assert sigmas.shape == timesteps.shape == (1000,)
    for i in (0, 1, 20, 250, 500, 999):
        exact = 3 * (i / 1000) / (1 + 2 * (i / 1000))
        assert sigmas[i] == exact
        assert timesteps[i] == int(1000 * exact)
    assert timesteps[1] == 2 and timesteps[500] == 750 and timesteps[999] == 999


def keys(seed, count):
    return jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(jnp.arange(count))


def test_sampled_levels_follow_the_logit_normal_law_of_the_unshifted_index():
    shift, count = 3.0, 20_000
    sigma, _ = flow.sample_sigmas(keys(0, count), shift)
    sigma = np.asarray(sigma, np.float64)
    unshifted = sigma / (shift - (shift - 1) * sigma)  # inverse of the shift
    index = np.rint(1000 * unshifted)
    np.testing.assert_allclose(1000 * unshifted, index, atol=2e-3)  # nothing but entries of the table
    logit = np.log((index + 0.5) / (999.5 - index))
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1) < 0.03


def test_sampled_timestep_is_the_table_entry_of_the_sampled_sigma():
    sigmas, timesteps = flow.training_levels(3.0)
    sigma, timestep = flow.sample_sigmas(keys(1, 512), 3.0)
    index = np.abs(np.asarray(sigma)[:, None] - sigmas).argmin(axis=1)
    np.testing.assert_array_equal(np.asarray(timestep), timesteps[index])


def test_continuous_timesteps_are_a_thousand_sigma():
    sigma, timestep = flow.sample_sigmas(keys(1, 64), 3.0, integer_timesteps=False)
    np.testing.assert_allclose(timestep, 1000 * sigma, rtol=1e-6)


def test_a_sampled_level_is_a_function_of_its_own_key():
    first, part, other = (flow.sample_sigmas(keys(*k), 3.0)[0] for k in ((3, 8), (3, 4), (4, 8)))
    np.testing.assert_array_equal(first[:4], part)
    assert not np.array_equal(first, other)


def test_a_sampled_level_is_the_floor_of_a_thousand_sigmoids():
    sigmas, timesteps = flow.training_levels(3.0)
    drawn = keys(2, 64)
    index = np.floor(1000 * np.asarray(jax.nn.sigmoid(jax.vmap(jax.random.normal)(drawn)))).astype(int)
    sigma, timestep = flow.sample_sigmas(drawn, 3.0)
    np.testing.assert_array_equal(sigma, sigmas[index].astype(np.float32))
    np.testing.assert_array_equal(timestep, timesteps[index])


def test_extreme_draws_stay_inside_the_table():
    sigma, timestep = flow.sample_sigmas(keys(0, 8), 3.0, mean=100.0)
    assert np.all(np.asarray(timestep) == 999) and np.all(np.asarray(sigma) < 1)


def test_losses_are_summed_by_noise_level():
    sums, counts = flow.by_level(jnp.asarray([1.0, 2.0, 4.0, 8.0]), jnp.asarray([0.0, 0.24, 0.25, 1.0]), 4)
    np.testing.assert_array_equal(sums, [3, 4, 0, 8])
    np.testing.assert_array_equal(counts, [2, 1, 0, 1])


def test_interpolant_runs_from_data_to_noise_at_the_velocity_target():
    x0, noise = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    sigma = jnp.array([0.0, 0.3, 1.0])
    x = flow.interpolate(x0, noise, sigma)
    np.testing.assert_array_equal(x[0], x0[0])
    np.testing.assert_array_equal(x[2], noise[2])
    np.testing.assert_allclose(x[1], 0.7 * x0[1] + 0.3 * noise[1], rtol=1e-6)
    slope = (flow.interpolate(x0, noise, sigma + 0.5) - x) / 0.5
    np.testing.assert_allclose(slope, flow.velocity_target(x0, noise), rtol=1e-4, atol=1e-5)


def test_loss_is_the_mean_squared_error_of_each_sample_in_float32():
    x0, noise, velocity = np.random.default_rng(1).normal(size=(3, 2, 4, 4, 2)).astype(np.float32)
    loss = flow.flow_loss(jnp.asarray(velocity, jnp.bfloat16), x0, noise)
    rounded = np.asarray(jnp.asarray(velocity, jnp.bfloat16), np.float32)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, ((rounded - (noise - x0)) ** 2).reshape(2, -1).mean(1), rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_a_shift_that_is_not_positive_is_named(shift):
    with pytest.raises(ValueError, match=f"flow shift {shift} is not a positive number"):
        flow.training_levels(shift)
