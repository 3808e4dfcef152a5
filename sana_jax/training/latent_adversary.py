"""The adversarial part of a distillation (LADD, arXiv 2403.12015, as SANA-Sprint uses it, arXiv 2503.09641, section 3.3).

A critic sees noised latents through the frozen teacher's features, together with the captions, and tells real ones from those that
the student predicts in one step. One backward pass serves both players: each term sees the other player's parameters, or its
latents, as constants. Deviations from the public trainer: both are updated in every step and not in turns; their gradients are clipped
together and not apart; the critic is shown no pictures with the captions of others.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sana_jax.diffusion import consistency, trigflow
from sana_jax.models.latent_critic import LatentCritic
from sana_jax.models.layers import BLOCKS
from sana_jax.models.transformer import SanaTransformer
from sana_jax.models.transformer_block import BLOCK_OUTPUT
from sana_jax.sampling.program import Features
from sana_jax.training.objective import normal_like
from sana_jax.training.step import split_each

CRITIC = "critic"


class Adversary(NamedTuple):
    """What `make_adversary` gives.

    Attributes:
      init: key -> the critic's parameters.
      losses: (params, frozen, network, latents, text, keys) -> (the student's losses [B], the critic's). `network` is the
        student: (points, angles) -> its prediction.
    """

    init: Callable[[jax.Array], dict]
    losses: Callable[..., tuple[jax.Array, jax.Array]]


def make_adversary(config, teacher: SanaTransformer) -> Adversary:
    """See the module; `config` is the whole tree."""
    section, critic = config.distillation, LatentCritic(jnp.dtype(config.dtype))

    def init(key):
        return critic.init(key, jnp.zeros((len(section.critic_blocks), 1, 1, teacher.config.width)))["params"]

    def features(weights, latents, text: Features, keys: Key[Array, " B"]) -> Float[Array, "K B N C"]:
        """The teacher's, of these latents under noise."""
        keys_angle, keys_noise = split_each(keys, 2)
        angles = consistency.sample_angles(keys_angle, section.critic_angle_mean, section.critic_angle_std)
        points = consistency.on_circle(latents, normal_like(latents, keys_noise), angles)
        x, sigma = consistency.flow_point(points, angles)
        timesteps = sigma / teacher.config.timestep_scale
        _, kept = teacher.apply({"params": weights}, x, timesteps, *text, mutable=["intermediates"])
        outputs = kept["intermediates"][BLOCKS][BLOCK_OUTPUT][0]
        found = jnp.stack([outputs[block] for block in section.critic_blocks])
        return found.reshape(*found.shape[:2], -1, found.shape[-1])

    def one_step(network, latents, keys):
        """The student's data predictions, some of them from pure noise."""
        keys_angle, keys_pure, keys_noise = split_each(keys, 3)
        angles = consistency.sample_angles(keys_angle, section.angle_mean, section.angle_std)
        pure = jax.vmap(lambda key: jax.random.bernoulli(key, section.pure_noise_share))(keys_pure)
        angles = jnp.where(pure, trigflow.MAX_ANGLE, angles)
        points = consistency.on_circle(latents, normal_like(latents, keys_noise), angles)
        return consistency.predicted_data(network(points, angles), points, angles)

    def losses(params, frozen, network, latents, text, keys):
        constant, weights = jax.lax.stop_gradient, frozen["teacher"]
        keys_student, keys_fake, keys_real = split_each(keys, 3)
        of_fake = features(weights, one_step(network, latents, keys_student), text, keys_fake)
        of_real = constant(features(weights, latents, text, keys_real))

        def opinion(critic_params, features):
            return critic.apply({"params": critic_params}, features)

        fooling = -jnp.mean(opinion(constant(params[CRITIC]), of_fake), axis=(0, 2))
        # Next to each other, so that both are on the picture's device, and the critic's kernels are normalised once for both.
        both = jnp.stack([constant(of_fake), of_real], axis=2)
        logits = opinion(params[CRITIC], both.reshape(both.shape[0], -1, *both.shape[3:]))
        fake, real = jnp.unstack(logits.reshape(*both.shape[:-1]), axis=2)
        hinge = jnp.mean(jax.nn.relu(1 - real) + jax.nn.relu(1 + fake), axis=(0, 2))
        return fooling, hinge / 2

    return Adversary(init, losses)
