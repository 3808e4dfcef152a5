r"""Solvers of the flow ODE $dx/d\sigma = v(x, \sigma)$ from noise ($\sigma \approx 1$) to data ($\sigma = 0$).

A solver is two pure functions and a table: `init` makes its state from noise, `step` advances the state by one
velocity, and `levels` holds, for each step, every number that depends on the noise levels alone. The table is computed
once in float64 NumPy, so that no logarithm or difference of close numbers is left for float32. `sample` is the loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sana_jax.diffusion.flow import TIMESTEPS, AnyArray, check_shift, shift_sigma

VelocityFn = Callable[[Float[Array, "B H W C"], Float[Array, " B"]], Float[Array, "B H W C"]]


class Solver(NamedTuple):
    """`init(noise) -> state`, `step(state, velocity, level) -> state`; `state.latents` is the solution so far.

    `levels` is a NamedTuple of arrays with a leading axis of N steps and has a field `timesteps`; `level` is one row.
    `sigma` is the noise level of the first step, `noise_scale` what pure noise is multiplied by to stand there.
    """

    init: Callable
    step: Callable
    levels: Any
    sigma: float
    noise_scale: float = 1.0


def sample(
    velocity_fn: VelocityFn,
    noise: Float[Array, "B H W C"],
    solver: Solver,
    on_step: Callable[[int], None] | None = None,
    x0: Float[Array, "B H W C"] | None = None,
) -> Float[Array, "B H W C"]:
    r"""Integrates from `noise` down to the last level of `solver`: N steps, one call of `velocity_fn` each.

    Args:
      velocity_fn: (latents, timesteps [B] in 0..1000) -> velocity.
      noise: latents at the first level; the state stays float32 whatever the network computes in.
      solver: `flow_euler(...)`, `flow_dpm(...)` or `trigflow(...)`.
      on_step: called on the host with the number of finished steps, for progress. A program with such a call cannot be
        kept in JAX's persistent compilation cache.
      x0: scaled latents of a picture to start from, in place of pure noise: the first point is
        $(1-\sigma)x_0 + \sigma\epsilon$ at the solver's first level.
    """

    def body(state, row):
        level, done = row
        timesteps = jnp.broadcast_to(level.timesteps, (noise.shape[0],))
        velocity = velocity_fn(state.latents, timesteps).astype(jnp.float32)
        state = solver.step(state, velocity, level)
        if on_step is not None:
            jax.debug.callback(on_step, done, ordered=True)
        return state, None

    levels = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), solver.levels)
    done = jnp.arange(1, len(solver.levels.timesteps) + 1)
    latents = noise.astype(jnp.float32)
    latents = solver.noise_scale * latents if x0 is None else (1 - solver.sigma) * x0 + solver.sigma * latents
    state, _ = jax.lax.scan(body, solver.init(latents), (levels, done))
    return state.latents


def start_step(num_steps: int, strength: float) -> int:
    """Number of steps img2img leaves out: int(N (1 - strength)), computed as diffusers does, and at most N - 1."""
    return min(int(num_steps - num_steps * strength), num_steps - 1)


# Flow-Euler


class EulerState(NamedTuple):
    latents: Float[AnyArray, "B H W C"]


class EulerLevels(NamedTuple):
    timesteps: Float[AnyArray, "*N"]
    delta: Float[AnyArray, "*N"]  # sigma of the next level minus sigma of this one: negative


def euler_step(state: EulerState, velocity: Float[AnyArray, "B H W C"], level: EulerLevels) -> EulerState:
    r"""$x_{t} = x_s + (\sigma_t - \sigma_s)\,v(x_s, \sigma_s)$: order 1."""
    return EulerState(state.latents + level.delta * velocity)


def euler_sigmas(num_steps: int, shift: float) -> Float[np.ndarray, " {num_steps}+1"]:
    """N + 1 noise levels from 1 to 0 as the public Flow-Euler (diffusers' FlowMatchEulerDiscreteScheduler) spaces them.

    Between 1 and the smallest training level the levels are evenly spaced and then shifted. The smallest level has
    already been shifted once when the spacing is made, so that it is shifted twice: a quirk of the public code that is
    kept, since its published pictures come from these levels.

    Raises:
      ValueError: `num_steps` < 1 or `shift` is not positive.
    """
    _check_num_steps(num_steps)
    check_shift(shift)
    smallest = shift_sigma(np.float64(1 / TIMESTEPS), shift)
    return np.append(shift_sigma(np.linspace(1.0, smallest, num_steps), shift), 0.0)


def flow_euler(num_steps: int, shift: float = 3.0, *, integer_timesteps: bool = True, start: int = 0) -> Solver:
    """Flow-Euler: 28 to 50 steps are usual (SANA, section 3.4).

    Args:
      num_steps: number of network evaluations N.
      shift: flow shift of the model.
      integer_timesteps: the network sees the timestep truncated, as it did in training.
      start: number of steps that are left out at the beginning, for img2img.

    Raises:
      ValueError: `num_steps` < 1 or `shift` is not positive.
    """
    sigmas = euler_sigmas(num_steps, shift)[start:]
    levels = EulerLevels(_timesteps(sigmas[:-1], integer_timesteps), np.diff(sigmas))
    return Solver(EulerState, euler_step, levels, float(sigmas[0]))


# Flow-DPM-Solver++


class DPMState(NamedTuple):
    latents: Float[AnyArray, "B H W C"]
    history: tuple[Float[AnyArray, "B H W C"], ...]  # data predictions of the order - 1 steps before, newest first


class DPMLevels(NamedTuple):
    timesteps: Float[AnyArray, "*N"]
    sigma: Float[AnyArray, "*N"]
    keep: Float[AnyArray, "*N"]  # weight of the latents
    weights: Float[AnyArray, "*N order"]  # weights of the data predictions, newest first


def dpm_step(state: DPMState, velocity: Float[AnyArray, "B H W C"], level: DPMLevels) -> DPMState:
    r"""One multistep step of Flow-DPM-Solver++: $x_t = k\,x_s + \sum_j w_j\,m_j$.

    $m_0 = x_s - \sigma_s v$ is the data prediction at this level, $m_1, m_2$ those of the levels before. The weights
    (`dpm_levels`) carry the order, and are 0 where a step has no history yet.
    """
    predictions = (state.latents - level.sigma * velocity, *state.history)
    latents = level.keep * state.latents
    for j, prediction in enumerate(predictions):
        latents = latents + level.weights[j] * prediction
    return DPMState(latents, predictions[: len(state.history)])


def dpm_sigmas(num_steps: int, shift: float) -> Float[np.ndarray, " {num_steps}+1"]:
    """N + 1 noise levels: evenly spaced from 0.999 to 0, then shifted ("time_uniform_flow" of the public code).

    Raises:
      ValueError: `num_steps` < 1 or `shift` is not positive.
    """
    _check_num_steps(num_steps)
    check_shift(shift)
    return shift_sigma(1 - np.linspace(1.0, 1 / TIMESTEPS, num_steps + 1), shift)[::-1].copy()


def dpm_levels(
    sigmas: Float[np.ndarray, " levels"], order: int, *, integer_timesteps: bool, lower_order_final: bool
) -> DPMLevels:
    r"""The table of `dpm_step` for given noise levels.

    With $\alpha = 1 - \sigma$ and $\lambda = \ln(\alpha/\sigma)$ the ODE between levels s and t is solved exactly,
    up to the data prediction under the integral (DPM-Solver++, arXiv 2211.01095, proposition 4.1), $h=\lambda_t-\lambda_s$:
    $$x_t = \frac{\sigma_t}{\sigma_s}x_s + \sigma_t\int_{\lambda_s}^{\lambda_t} e^\lambda\, x_0(\lambda)\,d\lambda .$$
    Replacing $x_0(\lambda)$ by the polynomial through the last `order` predictions, with derivatives $D_1, D_2$ at
    $\lambda_s$, leaves integrals of $e^\lambda(\lambda-\lambda_s)^n/n!$, that is $\alpha_t\varphi_n$ with
    $\varphi_0 = 1-e^{-h}$, $\varphi_1 = h - \varphi_0$, $\varphi_2 = h^2/2 - \varphi_1$:
    $$x_t = \tfrac{\sigma_t}{\sigma_s}x_s + \alpha_t\,(\varphi_0 m_0 + \varphi_1 D_1 + \varphi_2 D_2).$$
    Order 1 is Euler's method exactly. Order 2 takes $\varphi_1 \approx h\varphi_0/2$ ("midpoint"), which is the
    published solver and has the same order. At order 3, $D_2$ is twice the divided difference $[m_0, m_1, m_2]$.

    Deviation: the public order 3 (DPM-Solver++'s code and diffusers) leaves that factor of two out, and is thereby of
    order 2; ours is of order 3. Orders 1 and 2, which SANA uses, are the same.

    The first steps use what history there is. A last step to sigma = 0 ($h = \infty$) is of order 1 and returns $m_0$.

    Args:
      sigmas: N + 1 decreasing levels, the last may be 0.
      order: 1, 2 or 3.
      integer_timesteps: the network sees the timestep truncated.
      lower_order_final: with fewer than 15 steps, lower the order of the last two steps to at most 2 and 1.

    Raises:
      ValueError: `order` is not 1, 2 or 3.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"DPM-Solver order {order} is not 1, 2 or 3; SANA samples with 2.")
    num_steps = len(sigmas) - 1
    with np.errstate(divide="ignore"):
        lambdas = np.log(1 - sigmas) - np.log(sigmas)
    weights = np.zeros((num_steps, order))
    for i in range(num_steps):
        left = num_steps - i
        limit = left if lower_order_final and num_steps < 15 else order
        step_order = min(order, i + 1, limit) if sigmas[i + 1] > 0 else 1
        weights[i, :step_order] = (1 - sigmas[i + 1]) * _dpm_weights(lambdas[: i + 2], step_order)
    timesteps = _timesteps(sigmas[:-1], integer_timesteps)
    return DPMLevels(timesteps, sigmas[:-1], sigmas[1:] / sigmas[:-1], weights)


def _dpm_weights(lambdas: Float[np.ndarray, " K"], order: int) -> Float[np.ndarray, " {order}"]:
    """Weights of (m0, m1, m2)[:order] for the step from lambdas[-2] to lambdas[-1], without the factor alpha_t."""
    h = lambdas[-1] - lambdas[-2]
    phi0 = -np.expm1(-h)
    if order == 1:
        return np.array([phi0])
    h0 = lambdas[-2] - lambdas[-3]
    first = np.array([1, -1]) / h0  # divided difference [m0, m1]
    if order == 2:
        return np.array([phi0, 0]) + h * phi0 / 2 * first
    h1 = lambdas[-3] - lambdas[-4]
    second = (np.append(first, 0) - np.array([0, 1, -1]) / h1) / (h0 + h1)  # divided difference [m0, m1, m2]
    phi1 = h - phi0
    phi2 = h * h / 2 - phi1
    return np.array([phi0, 0, 0]) + phi1 * (np.append(first, 0) + h0 * second) + phi2 * 2 * second


def flow_dpm(
    num_steps: int,
    shift: float = 3.0,
    *,
    order: int = 2,
    integer_timesteps: bool = True,
    lower_order_final: bool = True,
    start: int = 0,
) -> Solver:
    """Flow-DPM-Solver++, multistep: SANA's own sampler, 14 to 20 steps (section 3.4; diffusers'
    DPMSolverMultistepScheduler with flow sigmas).

    Args:
      num_steps: number of network evaluations N.
      shift: flow shift of the model.
      order: 1 (the same step as Flow-Euler), 2 or 3.
      integer_timesteps: the network sees the timestep truncated, as it did in training.
      lower_order_final: lower the order of the last steps where N is below 15.
      start: number of steps that are left out at the beginning, for img2img; the history begins empty there.

    Raises:
      ValueError: `num_steps` < 1, `order` not 1 to 3, or `shift` not positive.
    """
    sigmas = dpm_sigmas(num_steps, shift)[start:]
    lower = lower_order_final and num_steps < 15  # of all N, as diffusers counts when it begins in the middle
    levels = dpm_levels(sigmas, order, integer_timesteps=integer_timesteps, lower_order_final=lower)

    def init(noise):
        return DPMState(noise, (jnp.zeros_like(noise),) * (order - 1))

    return Solver(init, dpm_step, levels, float(sigmas[0]))


def _timesteps(sigmas: Float[np.ndarray, " N"], integer: bool) -> Float[np.ndarray, " N"]:
    """Network time of each level; truncated in float64, since float32 rounds some levels up to the next integer."""
    timesteps = TIMESTEPS * sigmas
    return np.trunc(timesteps) if integer else timesteps


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_inference_steps={num_steps}: at least 1 step is needed; 20 is usual for Flow-DPM.")
