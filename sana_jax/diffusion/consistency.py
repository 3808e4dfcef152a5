r"""Continuous-time consistency distillation on TrigFlow's circle: sCM (arXiv 2410.11081) as SANA-Sprint uses it (arXiv 2503.09641, 3.2).

Notation of `trigflow`, with the point divided by $\sigma_d$: $y_t = \cos t\,x_0 + \sin t\,z$, and F is a network that predicts
$dy_t/dt$. The student's data prediction $f = \cos t\,y_t - \sin t\,F$ is consistent where it is the same at all points of a
trajectory of the teacher, $\dot y = F_{teacher}$. Along it,
$$\cos t\,\frac{df}{dt} = -\cos^2 t\,(F - \dot y) - \cos t\sin t\,\Bigl(y_t + \frac{dF}{dt}\Bigr) = g/\sigma_d,$$
where $dF/dt$ is the derivative along $(\dot y, 1)$. The loss moves F by a step along g, of at most unit length:
$\|F - F^- - g / (\|g\| + 0.1)\|^2$, $F^-$ being F as a constant, divided by a variance that is learnt of every t, whose logarithm is
added. (The public code has a weight $1/(\sigma_d\tan t)$ and a mean over the N values in place of the sum, which this variance takes
back: the two losses differ by the constant $\log(N\sigma_d\tan t)$. Here it starts near its optimum, where their learning rate of 2e-6
takes thousands of steps from theirs.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sana_jax.diffusion.flow import AnyArray

SIGMA_DATA = 0.5  # of the public recipe; it scales g beside the constant below, and the law of the angles
SMALLEST_LENGTH = 0.1
LARGEST_LOG = 8.0


def sample_angles(keys: Key[Array, " B"], mean: float, std: float) -> Float[Array, " B"]:
    r"""$t = \arctan(e^\tau / \sigma_d)$ with $\tau \sim \mathcal N(mean, std^2)$, cut off where float32 has no such angle; one a key."""
    logs = mean + std * jax.vmap(jax.random.normal)(keys)
    return jnp.arctan(jnp.exp(jnp.clip(logs, -LARGEST_LOG, LARGEST_LOG)) / SIGMA_DATA)


def on_circle(
    x0: Float[AnyArray, "B H W C"], noise: Float[AnyArray, "B H W C"], angles: Float[AnyArray, " B"]
) -> Float[AnyArray, "B H W C"]:
    r"""$y_t = \cos t\,x_0 + \sin t\,z$."""
    cosine, sine = _over_pictures(jnp.cos(angles)), _over_pictures(jnp.sin(angles))
    return cosine * x0 + sine * noise


def flow_point(
    y: Float[AnyArray, "B H W C"], angles: Float[AnyArray, " B"]
) -> tuple[Float[AnyArray, "B H W C"], Float[AnyArray, " B"]]:
    r"""Where a flow has $y_t$: $x_\sigma = y_t / (\sin t + \cos t)$ and $\sigma = \sin t / (\sin t + \cos t)$."""
    sine = jnp.sin(angles)
    both = sine + jnp.cos(angles)
    return y / _over_pictures(both), sine / both


def circle_velocity(
    velocity_fn: Callable, y: Float[AnyArray, "B H W C"], angles: Float[AnyArray, " B"]
) -> Float[AnyArray, "B H W C"]:
    r"""F at $y_t$ of a flow model: $F = (\cos t - \sin t)\,x_\sigma + v(x_\sigma, \sigma) / (\sin t + \cos t)$.

    Args:
      velocity_fn: (latents [B, H, W, C], noise levels [B]) -> velocity of the flow.
    """
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    x_sigma, sigma = flow_point(y, angles)
    velocity = velocity_fn(x_sigma, sigma)
    return _over_pictures(cosine - sine) * x_sigma + velocity / _over_pictures(sine + cosine)


def predicted_data(
    prediction: Float[AnyArray, "B H W C"], y: Float[AnyArray, "B H W C"], angles: Float[AnyArray, " B"]
) -> Float[AnyArray, "B H W C"]:
    r"""$f = \cos t\,y_t - \sin t\,F$."""
    return _over_pictures(jnp.cos(angles)) * y - _over_pictures(jnp.sin(angles)) * prediction


def tangent(
    network: Callable,
    y: Float[AnyArray, "B H W C"],
    angles: Float[AnyArray, " B"],
    slope: Float[AnyArray, "B H W C"],
    share: Float[AnyArray, ""] | float = 1.0,
) -> Float[AnyArray, "B H W C"]:
    r"""g of the file's beginning, with its second term multiplied by `share`, which a run raises from 0 to 1.

    Args:
      network: (y, angles) -> F, differentiable in forward mode (`kernels.derivatives.forward_mode`).
      slope: $\dot y$, the teacher's F.
    """
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    both = _over_pictures(cosine * sine)  # within the derivative, so that it stays finite at its ends
    prediction, rate = jax.jvp(network, (y, angles), (both * slope, cosine * sine))
    return -SIGMA_DATA * (_over_pictures(cosine) ** 2 * (prediction - slope) + share * (both * y + rate))


def consistency_losses(
    prediction: Float[AnyArray, "B H W C"],
    g: Float[AnyArray, "B H W C"],
    log_variance: Float[AnyArray, " B"],
) -> Float[AnyArray, " B"]:
    """The loss of every picture, of the student's F and the tangent."""
    length = jnp.sqrt(jnp.sum(jnp.square(g), axis=(1, 2, 3), keepdims=True))
    step = jax.lax.stop_gradient(g / (length + SMALLEST_LENGTH))
    error = jnp.sum(jnp.square(prediction - jax.lax.stop_gradient(prediction) - step), axis=(1, 2, 3))
    return error * jnp.exp(-log_variance) + log_variance


def _over_pictures(x: Float[AnyArray, " B"]) -> Float[AnyArray, "B 1 1 1"]:
    return x[:, None, None, None]
