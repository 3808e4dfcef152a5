"""TrigFlow's sampler against a NumPy restatement of the circle, and on models whose answer is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion import solvers, trigflow

SIGMA_DATA = 0.5
SHAPE = (2, 3, 4, 5)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def flow_velocity(x, sigma):
    """Any smooth field will do."""
    return 0.8 * x - 0.3 * x * x * x / (1 + x * x) + 0.4 * sigma - 0.2


def on_the_circle(angles, noise, step_noise):
    """The published algorithm in its own variables: x_t of scale sigma_data, the wrapped network F, float64."""
    x = SIGMA_DATA * noise.astype(np.float64)
    for i, (t, t_next) in enumerate(itertools.pairwise(angles)):
        sigma = np.sin(t) / (np.cos(t) + np.sin(t))
        root = np.sqrt(sigma**2 + (1 - sigma) ** 2)
        x_flow = x / SIGMA_DATA * root
        network = ((1 - 2 * sigma) * x_flow + (1 - 2 * sigma + 2 * sigma**2) * flow_velocity(x_flow, sigma)) / root
        x0 = np.cos(t) * x - np.sin(t) * SIGMA_DATA * network
        x = x0 if t_next == 0 else np.cos(t_next) * x0 + np.sin(t_next) * SIGMA_DATA * step_noise[i]
    return x / SIGMA_DATA


def sample(angles, noise, step_noise, timestep_scale=0.001, velocity=flow_velocity, **kwargs):
    solver = trigflow.trigflow(angles, jnp.asarray(step_noise), timestep_scale=timestep_scale, **kwargs)
    velocity_fn = lambda x, t: velocity(x, t[:, None, None, None] * timestep_scale)
    return jax.jit(lambda x: solvers.sample(velocity_fn, x, solver))(noise)


@pytest.mark.parametrize(
    "angles",
    [*map(trigflow.trigflow_angles, (1, 2, 4)), trigflow.check_angles((np.arctan(200 / 0.5), 1.3, 1.1, 0.6, 0))],
    ids=["1 step", "2 steps", "4 steps", "the paper's 4"],
)
def test_the_flows_variables_and_the_circles_come_to_the_same(angles):
    noise, between = draw(0, *SHAPE), draw(1, len(angles) - 2, *SHAPE)
    np.testing.assert_allclose(sample(angles, noise, between), on_the_circle(angles, noise, between), atol=2e-5)


def test_a_model_that_knows_the_answer_is_returned_exactly_after_one_step():
    answer = draw(2, *SHAPE)
    knows = lambda x, sigma: (x - answer) / sigma
    out = sample(trigflow.trigflow_angles(1), draw(0, *SHAPE), draw(1, 0, *SHAPE), velocity=knows)
    np.testing.assert_allclose(out, answer, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_the_embedding_sees_the_noise_level_whatever_the_timestep_scale(scale):
    levels = trigflow.trigflow(trigflow.trigflow_angles(4), draw(1, 3, *SHAPE), timestep_scale=scale).levels
    t = np.linspace(1.57080, 0, 5)[:-1]
    np.testing.assert_allclose(levels.timesteps * scale, np.tan(t) / (1 + np.tan(t)), rtol=1e-12)


def test_angles_are_the_public_ones():
    np.testing.assert_array_equal(trigflow.trigflow_angles(1), [1.57080, 0])
    np.testing.assert_array_equal(trigflow.trigflow_angles(2), [1.57080, 1.3, 0])
    np.testing.assert_allclose(trigflow.trigflow_angles(4), [1.5708, 1.1781, 0.7854, 0.3927, 0])


@pytest.mark.parametrize(
    "angles", [(1.3, 1.5, 0.0), (1.57080, 1.3), (0.0,), (1.6, 1.3, 0.0), (1.3, 1.3, 0.0), (np.nan, 0.0)]
)
def test_angles_that_are_none_are_named(angles):
    with pytest.raises(ValueError, match=r"are not the angles of TrigFlow: N \+ 1 decreasing numbers .* to 0, as"):
        trigflow.check_angles(angles)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="num_inference_steps=0: at least 1 step is needed; SANA-Sprint takes 1 to 4"):
        trigflow.trigflow_angles(0)


def test_leaving_out_steps_keeps_the_noise_of_the_others():
    whole = trigflow.trigflow(trigflow.trigflow_angles(4), draw(1, 3, *SHAPE)).levels
    later = trigflow.trigflow(trigflow.trigflow_angles(4), draw(1, 3, *SHAPE), start=2)
    for ours, all_of_them in zip(later.levels, whole, strict=True):
        np.testing.assert_array_equal(ours, all_of_them[2:])
    assert later.sigma == whole.sigma[2]


def test_step_noise_is_one_program_for_all_seeds(monkeypatch):
    normal, traced = jax.random.normal, []
    monkeypatch.setattr(jax.random, "normal", lambda *arguments: traced.append(0) or normal(*arguments))
    for seed in (3, 4, 5):
        trigflow.step_noise(seed, np.arange(2), 3, (2, 3, 7))
    assert len(traced) == 1


def test_step_noise_depends_on_seed_step_and_number_alone():
    shape = (4, 4, 8)
    whole = trigflow.step_noise(3, np.arange(5), 4, shape)
    assert whole.shape == (3, 5, *shape)
    np.testing.assert_array_equal(trigflow.step_noise(3, np.array([4, 2]), 3, shape), whole[:2, np.array([4, 2])])
    assert abs(float(whole.std()) - 1) < 0.1
    flat = np.asarray(whole).reshape(15, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(15)).max() < 0.5
    assert np.abs(whole - trigflow.step_noise(4, np.arange(5), 4, shape)).max() > 1
    assert trigflow.step_noise(3, np.arange(5), 1, shape).shape == (0, 5, *shape)
