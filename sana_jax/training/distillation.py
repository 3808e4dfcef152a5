"""Objective: a student that needs few steps, and no guidance beside its own, from a guided teacher (SANA-Sprint, arXiv 2503.09641).

The teacher's trajectories are those of classifier-free guidance at a scale that is drawn for every picture, and that the student is
told. See `diffusion.consistency` for what it learns of them, and `latent_adversary` for what it learns beside.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax import flops
from sana_jax.diffusion import consistency
from sana_jax.diffusion.guidance import classifier_free_guidance
from sana_jax.kernels.derivatives import forward_mode
from sana_jax.models.conditioning import FREQUENCY_CHANNELS, sinusoidal_embedding
from sana_jax.models.transformer import SanaTransformer
from sana_jax.parallel.transformer import apply_transformer
from sana_jax.training.latent_adversary import CRITIC, make_adversary
from sana_jax.training.objective import Objective, normal_like, null_for
from sana_jax.training.settings import IMPLEMENTATIONS
from sana_jax.training.step import split_each

LOG_VARIANCE = "log_variance"


def make_distillation(config, student: SanaTransformer, teacher: SanaTransformer) -> Objective:
    """See the module. The teacher's weights are `frozen["teacher"]`, the student's `params["transformer"]`.

    Beside the student trains the logarithm of the loss's variance, a linear function of sinusoids of the angle.

    Args:
      config: the whole tree; its section `distillation` is of this.
      student: takes a guidance scale.
      teacher: does not.
    """
    section, own_mask = config.distillation, config.text_encoder.null_mask == "own"
    adversary = make_adversary(config, teacher) if section.adversarial_weight else None
    # A kernel that the config forces has no derivative in forward mode.
    plain = student.clone(config=dataclasses.replace(student.config, **dict.fromkeys(IMPLEMENTATIONS, "auto")))

    def network(module, params, text, guidance):
        def velocity(latents, sigma):
            timesteps = sigma / module.config.timestep_scale
            return apply_transformer(module, params, latents, timesteps, *text, guidance)

        return functools.partial(consistency.circle_velocity, velocity)

    def guided_network(params, text, null, guidance):
        def velocity(latents, timesteps, condition):
            return apply_transformer(teacher, params, latents, timesteps, *condition)

        guided = classifier_free_guidance(velocity, text, null, guidance[:, None, None, None])
        return functools.partial(
            consistency.circle_velocity, lambda latents, sigma: guided(latents, sigma / teacher.config.timestep_scale)
        )

    def start(frozen, latents, text, null, keys):
        """(points, angles, guidance scales, the teacher's slopes there)."""
        keys_angle, keys_noise, keys_guidance = split_each(keys, 3)
        angles = consistency.sample_angles(keys_angle, section.angle_mean, section.angle_std)
        scales = jnp.asarray(section.guidance_scales, jnp.float32)
        guidance = jax.vmap(lambda key: jax.random.choice(key, scales))(keys_guidance)
        points = consistency.on_circle(latents, normal_like(latents, keys_noise), angles)
        slope = guided_network(frozen["teacher"], text, null_for(text, null, own_mask), guidance)(points, angles)
        return points, angles, guidance, jax.lax.stop_gradient(slope)

    def tangent(params, text, points, angles, guidance, slope, share):
        weights = jax.lax.stop_gradient(params["transformer"])
        with forward_mode():
            g = consistency.tangent(network(plain, weights, text, guidance), points, angles, slope, share)
        return jax.lax.stop_gradient(g)

    def losses(params, frozen, latents, hint, text, null, keys, step):
        del hint
        keys, keys_critic = split_each(keys, 2)
        points, angles, guidance, slope = start(frozen, latents, text, null, keys)
        share = jnp.minimum(1.0, step / section.tangent_warmup) if section.tangent_warmup else 1.0
        g = tangent(params, text, points, angles, guidance, slope, share)
        own = network(student, params["transformer"], text, guidance)
        variance = log_variance(params[LOG_VARIANCE], angles)
        found = consistency.consistency_losses(own(points, angles), g, variance)
        measured = {"consistency": jnp.mean(found), "tangent_rms": jnp.sqrt(jnp.mean(jnp.square(g)))}
        if adversary:
            fooling, telling = adversary.losses(params, frozen, own, latents, text, keys_critic)
            found += section.adversarial_weight * fooling + telling
            measured |= {"generator": jnp.mean(fooling), "critic": jnp.mean(telling)}
        return found, measured

    def heldout(params, frozen, latents, hint, text, null, keys):
        """Mean squares of the whole tangent, which is zero where the student is consistent."""
        del hint
        g = tangent(params, text, *start(frozen, latents, text, null, keys), 1.0)
        return jnp.mean(jnp.square(g), axis=(1, 2, 3))

    def picture_flops(velocity):
        """The student trains; it is evaluated with its tangent, and the teacher with and without the caption.

        With a critic the student trains a second time, through the teacher, which also sees the real latents. The critic's heads
        help to train and are not counted.
        """
        count = flops.training_flops(trained=velocity, frozen=(2 + 2) * velocity)
        if adversary:
            count += flops.training_flops(trained=velocity, passed=velocity, frozen=velocity)
        return count

    def init(key):
        return {LOG_VARIANCE: init_log_variance()} | ({CRITIC: adversary.init(key)} if adversary else {})

    return Objective(init, losses, heldout, picture_flops)


def init_log_variance() -> dict:
    """Of the variance one at all angles."""
    return {"weight": jnp.zeros(FREQUENCY_CHANNELS), "bias": jnp.zeros(())}


def log_variance(params: dict, angles: Float[Array, " B"]) -> Float[Array, " B"]:
    """The logarithm of the loss's variance at these angles, which is smooth in that of their tangent."""
    return sinusoidal_embedding(jnp.log(jnp.tan(angles))) @ params["weight"] + params["bias"]
