"""Solvers on a flow whose solution is known in closed form, and their tables against the published numbers.

Data that is normal with mean MEAN and standard deviation SPREAD has at level sigma the mean (1 - sigma) MEAN and the
variance S = (1 - sigma)^2 SPREAD^2 + sigma^2. The flow carries each point along at a constant number of standard
deviations from the mean, and the velocity is E[eps - x0 | x].
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion import solvers

MEAN, SPREAD = 0.7, 1.5
PUBLISHED_SIGMAS = """0.999666, 0.982420, 0.963941, 0.944094, 0.922722, 0.899640, 0.874635, 0.847457, 0.817810,
0.785340, 0.749625,
0.710152, 0.666296, 0.617284, 0.562148, 0.499667, 0.428265, 0.345888, 0.249792, 0.136240, 0.000000"""
PUBLISHED_TIMES = """999, 982, 963, 944, 922, 899, 874, 847, 817, 785, 749, 710, 666, 617, 562, 499, 428, 345,
249, 136"""


def variance(sigma):
    return (1 - sigma) ** 2 * SPREAD**2 + sigma**2


def velocity(x, sigma):
    centred = (x - (1 - sigma) * MEAN) / variance(sigma)
    data = MEAN + (1 - sigma) * SPREAD**2 * centred
    return sigma * centred - data


def solution(x, sigma, start):
    return (1 - sigma) * MEAN + np.sqrt(variance(sigma) / variance(start)) * (x - (1 - start) * MEAN)


def rows(levels):
    return [jax.tree.map(lambda x, i=i: x[i], levels) for i in range(len(levels.timesteps))]


def solve(solver, x):
    """The solver on the known flow, in float64 NumPy. Step functions are plain arithmetic, so that they allow it."""
    state = solver.init(x)
    for level in rows(solver.levels):
        state = solver.step(state, velocity(state.latents, level.timesteps / 1000), level)
    return np.asarray(state.latents)


def error(solver, start):
    """Largest distance from the exact solution at sigma = 0, from a spread of starting points at level `start`."""
    x = np.linspace(-2.0, 2.0, 9)[:, None, None, None]
    with jax.enable_x64(True):
        return np.abs(solve(solver, x) - solution(x, 0.0, start)).max()


def order_of(errors, counts):
    """Order of convergence: minus the slope of log error over log number of steps."""
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def test_published_levels_of_20_steps_at_shift_3():
    solver = solvers.flow_dpm(20, 3.0)
    np.testing.assert_allclose(solvers.dpm_sigmas(20, 3.0), np.array(PUBLISHED_SIGMAS.split(","), float), atol=5e-7)
    np.testing.assert_array_equal(solver.levels.timesteps, np.array(PUBLISHED_TIMES.split(","), float))


def test_continuous_timesteps_are_a_thousand_sigma():
    levels = solvers.flow_dpm(7, 3.0, integer_timesteps=False).levels
    np.testing.assert_allclose(levels.timesteps, 1000 * levels.sigma)


def test_euler_converges_at_order_1():
    counts = (80, 160, 320, 640)
    errors = [error(solvers.flow_euler(n, 3.0, integer_timesteps=False), 1.0) for n in counts]
    assert 0.9 < order_of(errors, counts) < 1.1


@pytest.mark.parametrize("order,low,high", [(1, 0.9, 1.1), (2, 1.7, 2.1)])
def test_dpm_converges_at_its_order_on_the_published_levels(order, low, high):
    """Order 2 is reached late and up to a logarithm: at both ends, steps in lambda do not shrink as N grows."""
    counts = (80, 160, 320, 640)
    errors = [
        error(solvers.flow_dpm(n, 3.0, order=order, integer_timesteps=False), solvers.dpm_sigmas(n, 3.0)[0])
        for n in counts
    ]
    assert low < order_of(errors, counts) < high


def test_20_steps_of_dpm_beat_40_steps_of_euler():
    dpm = error(solvers.flow_dpm(20, 3.0, integer_timesteps=False), solvers.dpm_sigmas(20, 3.0)[0])
    euler = error(solvers.flow_euler(40, 3.0, integer_timesteps=False), 1.0)
    assert dpm < euler / 2


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_converges_at_its_order_between_finite_levels_from_an_exact_history(order):
    """Without the first-order step to sigma = 0 and with true predictions before the start, order 3 shows, too."""
    x = np.linspace(-2.0, 2.0, 9)[:, None, None, None]
    errors, counts = [], (40, 80, 160, 320)
    for count in counts:
        lambdas = np.linspace(-2.0, 3.0, count + 1)
        lambdas = np.append(lambdas[0] - (lambdas[1] - lambdas[0]) * np.arange(2, 0, -1), lambdas)
        sigmas = 1 / (1 + np.exp(lambdas))
        levels = solvers.dpm_levels(sigmas, order, integer_timesteps=False, lower_order_final=False)
        exact = [solution(x, sigma, sigmas[2]) for sigma in sigmas]
        predictions = [x - sigma * velocity(x, sigma) for x, sigma in zip(exact, sigmas, strict=True)]
        state = solvers.DPMState(exact[2], (predictions[1], predictions[0])[: order - 1])
        for level in rows(levels)[2:]:
            state = solvers.dpm_step(state, velocity(state.latents, level.sigma), level)
        errors.append(np.abs(state.latents - exact[-1]).max())
    assert order - 0.15 < order_of(errors, counts) < order + 0.4


def test_first_order_dpm_is_eulers_step():
    level = rows(solvers.flow_dpm(5, 3.0, order=1).levels)
    sigmas = solvers.dpm_sigmas(5, 3.0)
    x, v = np.random.default_rng(0).normal(size=(2, 1, 2, 3, 1))
    for i in range(5):
        ours = solvers.dpm_step(solvers.DPMState(x, ()), v, level[i]).latents
        np.testing.assert_allclose(ours, x + (sigmas[i + 1] - sigmas[i]) * v, rtol=1e-10, atol=1e-12)


def test_second_order_step_is_the_published_formula():
    sigmas = solvers.dpm_sigmas(20, 3.0)
    levels = rows(solvers.flow_dpm(20, 3.0).levels)
    x, v, last = np.random.default_rng(1).normal(size=(3, 1, 2, 3, 1))
    lam = np.log((1 - sigmas[:-1]) / sigmas[:-1])
    for i in (1, 7, 18):
        m0, h = x - sigmas[i] * v, lam[i + 1] - lam[i]
        d = m0 + (m0 - last) / (2 * (lam[i] - lam[i - 1]) / h)
        published = sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * (np.exp(-h) - 1) * d
        state = solvers.dpm_step(solvers.DPMState(x, (last,)), v, levels[i])
        np.testing.assert_allclose(state.latents, published, rtol=1e-10)
        np.testing.assert_allclose(state.history[0], m0)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 14, 15, 20])
def test_the_last_step_returns_the_data_prediction(order, num_steps):
    levels = solvers.flow_dpm(num_steps, 3.0, order=order).levels
    assert levels.keep[-1] == 0
    np.testing.assert_array_equal(levels.weights[-1], [1, 0, 0][:order])


def test_few_steps_lower_the_order_at_the_end_and_many_do_not():
    def second_to_last(num_steps, **kwargs):
        return solvers.flow_dpm(num_steps, 3.0, order=3, **kwargs).levels.weights[-2]

    assert second_to_last(14)[2] == 0 and second_to_last(14)[1] != 0
    assert second_to_last(15)[2] != 0
    assert second_to_last(14, lower_order_final=False)[2] != 0


def test_every_step_leaves_a_constant_picture_where_it_is():
    """A network that predicts the same data everywhere: keep and weights must add up to the point on the path."""
    data, noise = 0.3, 1.7
    for order in (1, 2, 3):
        sigmas = solvers.dpm_sigmas(20, 3.0)
        solver = solvers.flow_dpm(20, 3.0, order=order)
        state = solver.init(np.full((1, 1, 1, 1), (1 - sigmas[0]) * data + sigmas[0] * noise))
        for i, level in enumerate(rows(solver.levels)):
            state = solver.step(state, np.full((1, 1, 1, 1), noise - data), level)
            np.testing.assert_allclose(state.latents, (1 - sigmas[i + 1]) * data + sigmas[i + 1] * noise, rtol=1e-5)


@pytest.mark.parametrize("make", [solvers.flow_euler, solvers.flow_dpm])
def test_the_scanned_loop_equals_the_steps_by_hand(make):
    noise = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))
    solver = make(6, 3.0, integer_timesteps=False)
    scanned = jax.jit(lambda x: solvers.sample(lambda x, t: velocity(x, t[:, None, None, None] / 1000), x, solver))(
        noise
    )
    np.testing.assert_allclose(scanned, solve(solver, np.asarray(noise)), rtol=1e-4, atol=1e-5)


def test_the_state_stays_float32_for_a_bfloat16_network():
    solver = solvers.flow_dpm(3, 3.0)
    noise = jnp.ones((1, 2, 2, 1), jnp.bfloat16)
    assert solvers.sample(lambda x, t: x.astype(jnp.bfloat16), noise, solver).dtype == jnp.float32


def test_progress_counts_every_step_once():
    seen = []
    solver = solvers.flow_dpm(5, 3.0)
    sampler = jax.jit(lambda x: solvers.sample(lambda x, t: x, x, solver, on_step=lambda done: seen.append(int(done))))
    jax.block_until_ready(sampler(jnp.ones((1, 2, 2, 1))))
    jax.effects_barrier()
    assert seen == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("make", [solvers.flow_euler, solvers.flow_dpm])
def test_fewer_than_one_step_is_an_error(make):
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        make(0, 3.0)


def test_an_order_above_3_is_an_error():
    with pytest.raises(ValueError, match="order 4 is not 1, 2 or 3"):
        solvers.flow_dpm(5, 3.0, order=4)
