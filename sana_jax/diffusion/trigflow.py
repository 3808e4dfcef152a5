r"""The sampler of SANA-Sprint: a few steps on TrigFlow's circle, with fresh noise between them.

TrigFlow (sCM, arXiv 2410.11081) noises data of standard deviation $\sigma_d$ by an angle $t \in [0, \pi/2]$,
$x_t = \sigma_d(\cos t\,x_0 + \sin t\,z)$, and its network $F$ predicts the data as
$\sigma_d\hat x_0 = \cos t\,x_t - \sin t\,\sigma_d F$. A flow model is such a network in other variables (SANA-Sprint,
arXiv 2503.09641, section 3.1): at the noise level $\sigma$ and the point $x_\sigma$,
$$\sigma = \frac{\sin t}{\sin t + \cos t}, \qquad x_\sigma = \frac{x_t}{\sigma_d(\sin t + \cos t)}
= (1-\sigma)x_0 + \sigma z, \qquad F = (\cos t - \sin t)\,x_\sigma + \frac{v(x_\sigma, \sigma)}{\sin t + \cos t}.$$
Put into the data prediction, everything but the flow's own prediction cancels: $\hat x_0 = x_\sigma - \sigma v$. The
consistency sampler, which predicts the data and noises the prediction again to the next, smaller angle, is then
$$x_{\sigma'} = (1-\sigma')\,(x_\sigma - \sigma v) + \sigma' z', \qquad z' \sim \mathcal N(0, I).$$
That is what runs here, on latents that are never multiplied by $\sigma_d$. diffusers (`SCMScheduler` and
`SanaSprintPipeline`, $\sigma_d = 0.5$) goes through $x_t$ and $F$ and comes to the same numbers.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sana_jax.diffusion.flow import AnyArray
from sana_jax.diffusion.noise import keys_of
from sana_jax.diffusion.solvers import Solver

MAX_ANGLE = 1.57080  # the public code's pi/2
INTERMEDIATE_ANGLE = 1.3  # between the two steps of the released models


class TrigFlowState(NamedTuple):
    latents: Float[AnyArray, "B H W C"]


class TrigFlowLevels(NamedTuple):
    timesteps: Float[AnyArray, "*N"]
    sigma: Float[AnyArray, "*N"]
    next_sigma: Float[AnyArray, "*N"]
    noise: Float[AnyArray, "*N B H W C"]  # z' of the step; that of the last one is multiplied by zero


def trigflow_step(state: TrigFlowState, velocity: Float[AnyArray, "B H W C"], level: TrigFlowLevels) -> TrigFlowState:
    r"""$x_{\sigma'} = (1-\sigma')(x_\sigma - \sigma v) + \sigma' z'$; the last step has $\sigma' = 0$."""
    x0 = state.latents - level.sigma * velocity
    return TrigFlowState((1 - level.next_sigma) * x0 + level.next_sigma * level.noise)


def trigflow_angles(num_steps: int) -> Float[np.ndarray, " {num_steps}+1"]:
    """N + 1 angles from MAX_ANGLE to 0: with two steps by way of INTERMEDIATE_ANGLE, else evenly spaced.

    These are the public pipeline's (`max_timesteps`, `intermediate_timesteps`). The paper's own for four steps are
    (1.5683, 1.3, 1.1, 0.6, 0).

    Raises:
      ValueError: `num_steps` < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_inference_steps={num_steps}: at least 1 step is needed; SANA-Sprint takes 1 to 4.")
    if num_steps == 2:
        return np.array([MAX_ANGLE, INTERMEDIATE_ANGLE, 0.0])
    return np.linspace(MAX_ANGLE, 0.0, num_steps + 1)


def check_angles(angles: Sequence[float | int] | Float[np.ndarray, " levels"]) -> Float[np.ndarray, " levels"]:
    """The angles in float64.

    Raises:
      ValueError: they are fewer than two, do not decrease, begin above a right angle or end elsewhere than at 0.
    """
    values = np.asarray(angles, np.float64)
    if len(values) < 2 or not (values[0] <= MAX_ANGLE and values[-1] == 0 and np.all(np.diff(values) < 0)):
        raise ValueError(
            f"timesteps={tuple(values.tolist())} are not the angles of TrigFlow: N + 1 decreasing numbers from at most "
            f"{MAX_ANGLE} to 0, as (1.5708, 1.3, 0.0)."
        )
    return values


def trigflow(
    angles: Float[np.ndarray, " levels"],
    step_noise: Float[AnyArray, "S B H W C"],
    *,
    timestep_scale: float = 0.001,
    start: int = 0,
) -> Solver:
    r"""SANA-Sprint's sampler (diffusers' SCMScheduler) over given angles and noise.

    Pure noise stands at the first angle as $x_t = \sigma_d z$, so that the flow sees it divided by $\sin t + \cos t$.

    Args:
      angles: `trigflow_angles(...)`, N + 1 of them.
      step_noise: the noise added after each step but the last; see `step_noise`.
      timestep_scale: of the transformer. Its embedding must see sigma in 0..1, so it is told sigma / timestep_scale.
      start: number of steps that are left out at the beginning, for img2img. Step i takes the same noise with any
        `start`.
    """
    sines, cosines = np.sin(angles), np.cos(angles)
    sigmas = sines / (sines + cosines)
    noise = jnp.concatenate([step_noise, jnp.zeros_like(step_noise, shape=(1, *step_noise.shape[1:]))])
    levels = TrigFlowLevels(sigmas[:-1] / timestep_scale, sigmas[:-1], sigmas[1:], noise)
    levels = TrigFlowLevels(*(values[start:] for values in levels))
    noise_scale = 1 / (sines[start] + cosines[start])
    return Solver(TrigFlowState, trigflow_step, levels, float(sigmas[start]), float(noise_scale))


def step_noise(
    seed: int | Sequence[int],
    indices: Sequence[int] | Int[np.ndarray, " B"],
    num_steps: int,
    shape: tuple[int, int, int],
) -> Float[Array, "{num_steps}-1 B h w C"]:
    """Standard normal noise after each step but the last, for the pictures numbered `indices`.

    Each is a function of (seed, step, its number) alone, and independent of the noise the pictures start from: step
    keys are numbered down from the largest number, those of pictures up from 0. `seed` as of `initial_noise`.
    """
    steps = np.uint32(2**32 - 1) - np.arange(num_steps - 1, dtype=np.uint32)
    indices = jnp.asarray(indices)
    return _step_noise(keys_of(seed, len(indices)), indices, steps, shape)


@functools.partial(jax.jit, static_argnames="shape")
def _step_noise(keys, indices, steps, shape):
    def one(key, index, step):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, step), index), shape)

    over_pictures = jax.vmap(one, in_axes=(0, 0, None))
    return jax.vmap(over_pictures, in_axes=(None, None, 0))(keys, indices, steps)
