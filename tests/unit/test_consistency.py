"""Consistency distillation against a distribution whose trajectories are known, and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion import consistency

STD = 0.3  # of normal data, whose trajectories are y_t = c sqrt(V(t)), V = STD^2 cos^2 t + sin^2 t


def points(seed=0):
    rng = np.random.default_rng(seed)
    angles = jnp.asarray([0.05, 0.4, 1.1, 1.55], jnp.float32)
    return jnp.asarray(rng.normal(size=(4, 2, 2, 3)), jnp.float32), angles


def over(x):
    return x[:, None, None, None]


def variance(angles):
    return over(STD**2 * jnp.cos(angles) ** 2 + jnp.sin(angles) ** 2)


def slope(y, angles):
    """Of the trajectory through y: y V' / 2V."""
    return y * over(jnp.cos(angles) * jnp.sin(angles)) * (1 - STD**2) / variance(angles)


def consistent(y, angles):
    """The network whose data prediction is where the trajectory begins, y STD / sqrt(V)."""
    start = y * STD / jnp.sqrt(variance(angles))
    return (over(jnp.cos(angles)) * y - start) / over(jnp.sin(angles))


def test_the_tangent_of_a_consistent_network_is_zero_and_that_of_the_teacher_itself_is_not():
    y, angles = points()
    dy = slope(y, angles)
    found = consistency.tangent(consistent, y, angles, dy)
    teacher = consistency.tangent(slope, y, angles, dy)
    np.testing.assert_allclose(found, 0, atol=3e-6)
    assert np.abs(teacher[1]).max() > 0.05


def test_the_tangent_is_the_rate_of_the_data_prediction_along_the_trajectory():
    y, angles = points(1)

    def network(y, angles):
        return jnp.sin(2 * y) * over(angles) + y**2

    def prediction(step):
        """Of the point that lies `step` further on the trajectory."""
        moved = y * jnp.sqrt(variance(angles + step) / variance(angles))
        return consistency.predicted_data(network(moved, angles + step), moved, angles + step)

    step = 1e-2
    rate = (prediction(step) - prediction(-step)) / (2 * step)
    wanted = consistency.SIGMA_DATA * over(jnp.cos(angles)) * rate
    found = consistency.tangent(network, y, angles, slope(y, angles))
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())
    without = consistency.tangent(network, y, angles, slope(y, angles), 0.0)
    np.testing.assert_allclose(
        without,
        -consistency.SIGMA_DATA * over(jnp.cos(angles)) ** 2 * (network(y, angles) - slope(y, angles)),
        rtol=1e-5,
    )


def test_a_flow_model_predicts_the_same_data_on_the_circle():
    y, angles = points(2)

    def velocity(x, sigma):
        return jnp.tanh(x) * over(sigma)

    found = consistency.predicted_data(consistency.circle_velocity(velocity, y, angles), y, angles)
    both = np.sin(angles) + np.cos(angles)
    x, sigma = y / over(both), np.sin(angles) / both
    np.testing.assert_allclose(found, x - over(sigma) * np.tanh(x) * over(sigma), atol=1e-6)


def test_the_loss_moves_the_prediction_along_the_tangent_by_at_most_its_unit():
    y, _ = points(3)
    g = 100 * y
    log_variance = jnp.asarray([0.0, 1.0, -1.0, 0.5])
    losses, gradient = jax.value_and_grad(lambda F: consistency.consistency_losses(F, g, log_variance).sum())(y)
    length = np.sqrt((np.asarray(g) ** 2).sum((1, 2, 3)))
    wanted = -2 * over(np.exp(-np.asarray(log_variance)) / (length + 0.1)) * g
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4)
    error = (length / (length + 0.1)) ** 2
    assert losses == pytest.approx(float((np.exp(-np.asarray(log_variance)) * error + log_variance).sum()), rel=1e-5)


def test_angles_follow_the_law_of_their_tangents():
    keys = jax.random.split(jax.random.key(0), 20_000)
    angles = consistency.sample_angles(keys, 0.2, 1.6)
    logs = np.log(0.5 * np.tan(np.asarray(angles, np.float64)))
    assert logs.mean() == pytest.approx(0.2, abs=0.05) and logs.std() == pytest.approx(1.6, abs=0.05)
    extreme = consistency.sample_angles(keys, 0.0, 1e4)
    assert 0 < extreme.min() and np.all(np.tan(np.asarray(extreme)) > 0) and np.all(jnp.tan(extreme) > 0)
