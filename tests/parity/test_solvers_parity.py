"""Solver tables and trajectories against diffusers' schedulers."""

import jax
import numpy as np
import pytest
from parity_errors import relative_error

from sana_jax.diffusion import flow, solvers

pytestmark = pytest.mark.parity
diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

SHIFTS = (1.0, 3.0, 4.0, 6.0)
TABLES = ("schedulers Flow-DPM and Flow-Euler", "levels of 1 to 50 steps, shifts 1 to 6, absolute")
TRAJECTORIES = ("schedulers Flow-DPM and Flow-Euler", "trajectories on a fixed model")


def dpm_scheduler(shift=3.0, order=2, cls=None):
    cls = cls or diffusers.DPMSolverMultistepScheduler
    return cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=order)


def analytic_velocity(x, timestep):
    """A smooth field that depends on place, channel and time; works on torch and JAX arrays."""
    return 0.8 * x - 0.3 * x * x * x / (1 + x * x) + 0.4 * (timestep / 1000) - 0.2


def their_trajectory(scheduler, noise, num_steps):
    scheduler.set_timesteps(num_steps)
    latents = torch.from_numpy(noise)
    for t in scheduler.timesteps:
        latents = scheduler.step(analytic_velocity(latents, float(t)), t, latents, return_dict=False)[0]
    return latents.numpy()


def our_trajectory(solver, noise):
    velocity_fn = lambda x, t: analytic_velocity(x, t[:, None, None, None])
    return np.asarray(jax.jit(lambda x: solvers.sample(velocity_fn, x, solver))(noise))


@pytest.fixture
def noise():
    return np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("shift", SHIFTS)
def test_dpm_levels_and_timesteps_equal_diffusers_for_1_to_50_steps(shift, measured):
    errors = []
    for num_steps in range(1, 51):
        scheduler = dpm_scheduler(shift)
        scheduler.set_timesteps(num_steps)
        errors.append(np.abs(solvers.dpm_sigmas(num_steps, shift).astype(np.float32) - scheduler.sigmas.numpy()).max())
        timesteps = solvers.flow_dpm(num_steps, shift).levels.timesteps
        np.testing.assert_array_equal(timesteps, scheduler.timesteps.numpy(), err_msg=f"{num_steps} steps")
    measured(*TABLES, max(errors), 1e-6)
    scheduler.set_timesteps(20)
    assert np.abs(solvers.dpm_sigmas(20, shift + 1e-3) - scheduler.sigmas.numpy()).max() > 1e-5


@pytest.mark.parametrize("shift", SHIFTS)
def test_euler_levels_and_timesteps_equal_diffusers_for_1_to_50_steps(shift, measured):
    errors = []
    for num_steps in range(1, 51):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(num_steps)
        errors.append(np.abs(solvers.euler_sigmas(num_steps, shift) - scheduler.sigmas.numpy()).max())
        timesteps = solvers.flow_euler(num_steps, shift, integer_timesteps=False).levels.timesteps
        np.testing.assert_allclose(timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    measured(*TABLES, max(errors), 1e-6)
    if shift > 1:  # the smallest level is shifted twice
        scheduler.set_timesteps(20)
        shifted_once = flow.shift_sigma(np.linspace(1, 1e-3, 20), shift)
        assert np.abs(shifted_once - scheduler.sigmas.numpy()[:-1]).max() > 1e-4


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 14, 15, 20, 50])
def test_dpm_trajectory_equals_diffusers(order, num_steps, noise, measured):
    theirs = their_trajectory(dpm_scheduler(order=order), noise, num_steps)
    ours = our_trajectory(solvers.flow_dpm(num_steps, 3.0, order=order), noise)
    measured(*TRAJECTORIES, relative_error(ours, theirs), 2e-5)


@pytest.mark.parametrize("num_steps", [1, 7, 28])
def test_euler_trajectory_equals_diffusers(num_steps, noise, measured):
    theirs = their_trajectory(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), noise, num_steps)
    ours = our_trajectory(solvers.flow_euler(num_steps, 3.0, integer_timesteps=False), noise)
    measured(*TRAJECTORIES, relative_error(ours, theirs), 2e-5)


class DoubledSecondDifference(diffusers.DPMSolverMultistepScheduler):
    """diffusers' order 3 with the factor of two restored that makes its last term a second derivative."""

    def multistep_dpm_solver_third_order_update(self, model_output_list, *args, sample=None, noise=None, **kwargs):
        published = super().multistep_dpm_solver_third_order_update(model_output_list, sample=sample, noise=noise)
        t, s0, s1, s2 = (self.sigmas[self.step_index + i].double() for i in (1, 0, -1, -2))
        lam = lambda sigma: torch.log(1 - sigma) - torch.log(sigma)
        h, h0, h1 = lam(t) - lam(s0), lam(s0) - lam(s1), lam(s1) - lam(s2)
        m0, m1, m2 = (model_output_list[i].double() for i in (-1, -2, -3))
        second = ((m0 - m1) / h0 - (m1 - m2) / h1) / (h0 + h1)
        return (published + (1 - t) * (h * h / 2 - h + 1 - torch.exp(-h)) * second).float()


@pytest.mark.parametrize("num_steps", [5, 14, 20])
def test_third_order_trajectory_equals_diffusers_with_the_missing_factor_restored(num_steps, noise, measured):
    theirs = their_trajectory(dpm_scheduler(order=3, cls=DoubledSecondDifference), noise, num_steps)
    published = their_trajectory(dpm_scheduler(order=3), noise, num_steps)
    ours = our_trajectory(solvers.flow_dpm(num_steps, 3.0, order=3), noise)
    measured(*TRAJECTORIES, relative_error(ours, theirs), 2e-5)
    assert np.abs(ours - published).max() > 2e-4


def test_a_wrong_shift_breaks_trajectory_parity(noise):
    theirs = their_trajectory(dpm_scheduler(shift=3.0), noise, 20)
    assert np.abs(our_trajectory(solvers.flow_dpm(20, 4.0), noise) - theirs).max() > 1e-3


@pytest.mark.parametrize("order,num_steps,start", [(2, 20, 8), (2, 6, 5), (1, 20, 8)])
def test_dpm_img2img_trajectory_equals_diffusers_begun_in_the_middle(order, num_steps, start, noise, measured):
    x0 = np.random.default_rng(1).normal(size=noise.shape).astype(np.float32)
    scheduler = dpm_scheduler(order=order)
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(start)
    timesteps = scheduler.timesteps[start:]
    latents = scheduler.add_noise(*map(torch.from_numpy, (x0, noise)), timesteps[:1])
    for t in timesteps:
        latents = scheduler.step(analytic_velocity(latents, float(t)), t, latents, return_dict=False)[0]
    ours = img2img_trajectory(solvers.flow_dpm(num_steps, 3.0, order=order, start=start), x0, noise)
    measured(*TRAJECTORIES, relative_error(ours, latents.numpy()), 2e-5)


def test_beginning_one_step_later_breaks_img2img_parity(noise):
    x0 = np.random.default_rng(1).normal(size=noise.shape).astype(np.float32)
    right, late = (img2img_trajectory(solvers.flow_dpm(20, 3.0, start=start), x0, noise) for start in (8, 9))
    assert relative_error(late, right) > 1e-3


def test_euler_img2img_trajectory_equals_diffusers_begun_in_the_middle(noise, measured):
    x0 = np.random.default_rng(1).normal(size=noise.shape).astype(np.float32)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(8)
    timesteps = scheduler.timesteps[8:]
    latents = scheduler.scale_noise(torch.from_numpy(x0), timesteps[:1], torch.from_numpy(noise))
    for t in timesteps:
        latents = scheduler.step(analytic_velocity(latents, float(t)), t, latents, return_dict=False)[0]
    ours = img2img_trajectory(solvers.flow_euler(20, 3.0, integer_timesteps=False, start=8), x0, noise)
    measured(*TRAJECTORIES, relative_error(ours, latents.numpy()), 2e-5)


def img2img_trajectory(solver, x0, noise):
    velocity_fn = lambda x, t: analytic_velocity(x, t[:, None, None, None])
    return np.asarray(jax.jit(lambda x0, x: solvers.sample(velocity_fn, x, solver, x0=x0))(x0, noise))
