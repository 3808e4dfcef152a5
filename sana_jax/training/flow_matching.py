"""Objective: the velocity of the straight path between data and noise (SANA section 3.4)."""

import jax
import jax.numpy as jnp

from sana_jax import flops
from sana_jax.diffusion import flow
from sana_jax.models.transformer import SanaTransformer
from sana_jax.parallel.transformer import apply_transformer
from sana_jax.sampling.program import Features
from sana_jax.training.adapter import Adapter
from sana_jax.training.metrics import Binned
from sana_jax.training.objective import Objective, normal_like, null_for
from sana_jax.training.step import split_each

LEVEL_BINS = 10  # of the noise levels whose losses are logged apart


def make_flow_matching(config, transformer: SanaTransformer, adapter: Adapter | None = None) -> Objective:
    """See the module.

    A caption dropped for classifier-free guidance is replaced by the empty prompt, token mask included, as the sampler gives
    it. The public trainer keeps the caption's mask, so that its null branch sees as many null features as the caption had
    tokens, and its sampler in diffusers does not; `text_encoder.null_mask="prompt"` trains as that trainer does, and exports
    a model that is sampled so (`SamplingDefaults.null_mask`).

    Args:
      config: the whole tree.
      transformer: what trains.
      adapter: what trains in its place; None: nothing.
    """
    train = config.train

    def velocity_losses(params, frozen, latents, hint, text, keys):
        """(losses [B], noise levels [B])."""
        keys_sigma, keys_noise = split_each(keys, 2)
        sigma, timesteps = flow.sample_sigmas(
            keys_sigma,
            train.flow_shift,
            mean=train.logit_mean,
            std=train.logit_std,
            integer_timesteps=transformer.config.integer_timesteps,
        )
        noise = normal_like(latents, keys_noise)
        noisy = flow.interpolate(latents, noise, sigma)
        if adapter is None:
            weights, branch = params["transformer"], None
        else:
            weights, branch = adapter.weights(params, frozen), adapter.branch(params, hint, text.hidden)
        output = apply_transformer(transformer, weights, noisy, timesteps, *text, branch=branch)
        return flow.flow_loss(output, latents, noise), sigma

    def losses(params, frozen, latents, hint, text, null, keys, step):
        del step
        keys_drop, keys_flow = split_each(keys, 2)
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, train.class_dropout_prob))(keys_drop)
        null = null_for(text, null, config.text_encoder.null_mask == "own")
        hidden = jnp.where(dropped[:, None, None], null.hidden, text.hidden)
        text = Features(hidden, jnp.where(dropped[:, None], null.mask, text.mask))
        losses, sigma = velocity_losses(params, frozen, latents, hint, text, keys_flow)
        return losses, {"loss_at_sigma": Binned(*flow.by_level(jax.lax.stop_gradient(losses), sigma, LEVEL_BINS))}

    def heldout(params, frozen, latents, hint, text, null, keys):
        del null
        return velocity_losses(params, frozen, latents, hint, text, keys)[0]

    def picture_flops(velocity):
        return flops.training_flops(trained=velocity) if adapter is None else adapter.picture_flops(velocity)

    return Objective(lambda key: {}, losses, heldout, picture_flops)
