"""Task "autoencoder": DC-AE by L1 (or L2), a perceptual term and, where wanted, a PatchGAN (DC-AE section 3.3)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sana_jax import flops
from sana_jax.bit_depth import from_eight_bits
from sana_jax.models import efficientnet
from sana_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sana_jax.models.patch_gan import PatchDiscriminator, discriminator_loss, generator_loss
from sana_jax.training import lpips
from sana_jax.training.perceptual import perceptual_distance
from sana_jax.training.settings import check_sides, model_config
from sana_jax.training.start import load_start
from sana_jax.training.step import split_each
from sana_jax.training.task import PyTree, Task
from sana_jax.weights import efficientnet as efficientnet_weights
from sana_jax.weights import folder, parts


def psnr(images: Float[Array, "B H W 3"], targets: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
    r"""Peak signal-to-noise ratio in dB of pictures in -1..1: $10\log_{10}(2^2 / \mathrm{MSE})$."""
    mse = jnp.mean((jnp.clip(images, -1, 1) - targets) ** 2, axis=(1, 2, 3))
    return 10 * jnp.log10(4 / jnp.maximum(mse, 1e-10))


def make_autoencoder_task(config) -> Task:
    """The autoencoder of `config.model`, alone or with a discriminator; see `Task`.

    One backward pass serves both players: each term of the loss sees the other player's parameters, or its pictures,
    as constants, so that the gradient of the sum is each player's own.

    `load_frozen` reads the weights of the perceptual term, if there is one.

    Raises:
      ValueError: the model's config is impossible, or there is no such loss.
    """
    module = Autoencoder(model_config(AutoencoderConfig, config.model, config.dtype, "model"))
    check_sides(config, module.config.downsample_factor, "the autoencoder's factor")
    if config.reconstruction not in ("l1", "l2"):
        raise ValueError(f"reconstruction={config.reconstruction!r} is not one of l1, l2.")
    check_decoder_options(config)
    dtype = jnp.dtype(config.dtype)
    critic = PatchDiscriminator(config.gan.width, config.gan.depth, dtype)
    size = config.data.image_size
    pictures = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    perceptual = make_perceptual(config) if config.perceptual_weight else None

    def init(key):
        key_autoencoder, key_critic = jax.random.split(key)
        params = {"autoencoder": module.init(key_autoencoder, _zeros(pictures))["params"]}
        if config.gan.weight:
            params["discriminator"] = critic.init(key_critic, _zeros(pictures))["params"]
        return params

    def load_initial(places):
        wanted, place = module.config, places["autoencoder"]
        start = load_start(parts.AUTOENCODER, folder.load_autoencoder, wanted, config.init_from, place)
        params = {"autoencoder": start}
        if config.gan.weight:
            born = jax.jit(
                lambda key: critic.init(key, _zeros(pictures))["params"], out_shardings=places["discriminator"]
            )
            params["discriminator"] = born(jax.random.key(config.seed))
        return params

    def load_frozen(places):
        return jax.device_put({"perceptual": perceptual.load()}, places) if perceptual else {}

    def reconstruct(params, images):
        return module.apply({"params": params["autoencoder"]}, images)

    def train_reconstruct(params, images, keys):
        """Reconstructions from the latents as a decoder is to meet them in sampling: perturbed, and given."""
        params = {"params": params["autoencoder"]}
        latents = module.apply(params, images, method="encode")
        latents = jax.lax.stop_gradient(latents) if config.freeze_encoder else latents
        if config.latent_noise:
            latents = perturb(latents, keys, config.latent_noise)
        return module.apply(params, latents, method="decode")

    def prepare(batch):
        return {"images": batch["images"]}

    def loss(params, frozen, batch, keys, step):
        images = from_eight_bits(batch["images"])
        output = train_reconstruct(params, images, keys)
        metrics = {
            "l1": jnp.mean(jnp.abs(output - images)),
            "l2": jnp.mean(jnp.square(output - images)),
            "psnr": jnp.mean(psnr(output, images)),
        }
        total = metrics[config.reconstruction]
        if config.perceptual_weight:
            metrics["perceptual"] = jnp.mean(perceptual.distance(frozen["perceptual"], output, images))
            total += config.perceptual_weight * metrics["perceptual"]
        if config.gan.weight:
            opinion, constant = params["discriminator"], jax.lax.stop_gradient
            metrics["generator"] = generator_loss(critic.apply({"params": constant(opinion)}, output))
            metrics["discriminator"] = discriminator_loss(
                critic.apply({"params": opinion}, images), critic.apply({"params": opinion}, constant(output))
            )
            playing = step >= config.gan.start_step
            total += jnp.where(playing, config.gan.weight * metrics["generator"] + metrics["discriminator"], 0.0)
        return total, metrics | {"loss": total}

    def show(params, frozen, batch):
        del frozen
        images = from_eight_bits(batch["images"])
        output = reconstruct(params, images)
        pairs = jnp.stack([images, output], axis=1).reshape(-1, *images.shape[1:])
        return pairs, {f"{config.sample.split}_psnr": jnp.mean(psnr(output, images))}

    def picture_flops(height, width):
        """Of the autoencoder alone: discriminator and perceptual term help to train it and are not the model."""
        encoder, decoder = (count(module.config, height, width) for count in (flops.encoder_flops, flops.decoder_flops))
        if config.freeze_encoder:
            return flops.training_flops(trained=decoder, frozen=encoder)
        return flops.training_flops(trained=encoder + decoder)

    def measure(params, batch):
        images = from_eight_bits(batch["images"])
        latents = module.apply({"params": params["autoencoder"]}, images, method="encode")
        return {"scaling_factor": 1 / jnp.std(latents)}

    def export(params, path, measured, before):
        del before
        scaled = dataclasses.replace(module.config, scaling_factor=float(measured["scaling_factor"]))
        folder.save_autoencoder(Autoencoder(scaled), params["autoencoder"], path / "vae", config.train.export_dtype)

    return Task(
        init=init,
        load_initial=load_initial if config.init_from else None,
        frozen={"perceptual": perceptual.shapes} if perceptual else {},
        load_frozen=load_frozen,
        prepare=prepare,
        prepare_heldout=prepare,
        loss=loss,
        picture_flops=picture_flops,
        show=show,
        columns=8,
        measure=measure,
        export=export,
    )


def perturb(latents: Float[Array, "B h w C"], keys: Key[Array, " B"], noise: float) -> Float[Array, "B h w C"]:
    r"""$z + \tau|a|\,\mathrm{std}(z)\,\epsilon$ with one $a \sim \mathcal N(0, 1)$ a picture, $\tau$ = `noise`.

    A decoder that was trained on such latents forgives the errors of generated ones (Zheng et al. 2025, "Diffusion
    Transformers with Representation Autoencoders", section 4.3).
    """
    keys_level, keys_noise = split_each(keys, 2)
    level = noise * jnp.abs(jax.vmap(lambda key: jax.random.normal(key, (1, 1, 1)))(keys_level))
    scale = jax.lax.stop_gradient(jnp.std(latents))
    return latents + level * scale * jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys_noise)


def check_decoder_options(config) -> None:
    """Raises ValueError where the options of decoder training contradict each other."""
    if config.latent_noise < 0:
        raise ValueError(f"latent_noise={config.latent_noise} is negative; 0 switches it off, 0.25 suits a decoder.")
    if config.freeze_encoder and not config.init_from:
        raise ValueError("freeze_encoder=True keeps an encoder that nothing has trained; set init_from to its run.")
    if config.freeze_encoder and config.optimizer.weight_decay:
        raise ValueError(
            f"freeze_encoder=True and optimizer.weight_decay={config.optimizer.weight_decay}: decay would move the "
            "encoder. Use weight_decay=0."
        )


class Perceptual(NamedTuple):
    """A perceptual term of the loss.

    Attributes:
      shapes: of its weights, which do not train.
      load: reads them. Raises ModuleNotFoundError or FileNotFoundError where they are not here.
      distance: (weights, pictures, targets) -> distances [B].
    """

    shapes: PyTree
    load: Callable[[], PyTree]
    distance: Callable[[PyTree, jax.Array, jax.Array], jax.Array]


def make_perceptual(config) -> Perceptual:
    """The term that `config.perceptual` names.

    Raises:
      ValueError: there is no such term.
    """
    if config.perceptual == "lpips":
        return Perceptual(
            lpips.shapes(),
            functools.partial(lpips.load, config.lpips_vgg, config.lpips_heads),
            lambda weights, output, images: perceptual_distance(
                functools.partial(lpips.features, weights), output, images, weights["channel_weights"]
            ),
        )
    if config.perceptual == "efficientnet":
        init, picture = efficientnet.EfficientNetLite0().init, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        return Perceptual(
            jax.eval_shape(init, jax.random.key(0), picture)["params"],
            efficientnet_weights.load,
            lambda weights, output, images: perceptual_distance(
                functools.partial(efficientnet.features, weights, dtype=jnp.dtype(config.dtype)), output, images
            ),
        )
    raise ValueError(f"perceptual={config.perceptual!r} is not one of efficientnet, lpips.")


def _zeros(x):
    return jnp.zeros(x.shape, x.dtype)
