"""PatchGAN (Isola et al., 2017): a small critic that judges patches, for the autoencoder's last phase of training."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Names of the parameters' axes, by path; see `parallel.sharding`.
LOGICAL_AXES = {
    "*/kernel": (None, None, "channels", "embed"),
    "*/scale": None,
    "*/bias": None,
}


class PatchDiscriminator(nn.Module):
    """Stride-2 4x4 convolutions, width doubling each time, then one logit per patch: positive means "real".

    GroupNorm in place of the original's BatchNorm, whose statistics would tie real and generated pictures of a batch
    together; no spectral norm, since the hinge loss and a small weight keep it tame at the sizes we train.
    """

    width: int = 64
    depth: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w"]:
        x = images.astype(self.dtype)
        for level in range(self.depth):
            x = nn.Conv(self.width * 2**level, (4, 4), strides=2, padding=1, dtype=self.dtype, name=f"down_{level}")(x)
            if level:
                x = nn.GroupNorm(num_groups=None, group_size=16, dtype=self.dtype, name=f"norm_{level}")(x)
            x = nn.leaky_relu(x, 0.2)
        return nn.Conv(1, (3, 3), padding=1, dtype=self.dtype, name="logit")(x)[..., 0].astype(jnp.float32)


def discriminator_loss(real: Float[Array, "B h w"], fake: Float[Array, "B h w"]) -> Float[Array, ""]:
    r"""Hinge loss: $\frac12\,\mathrm{mean}\max(0, 1 - D(x)) + \frac12\,\mathrm{mean}\max(0, 1 + D(\hat x))$."""
    return 0.5 * jnp.mean(jax.nn.relu(1 - real)) + 0.5 * jnp.mean(jax.nn.relu(1 + fake))


def generator_loss(fake: Float[Array, "B h w"]) -> Float[Array, ""]:
    r"""What the autoencoder minimises to be taken for real: $-\mathrm{mean}\,D(\hat x)$."""
    return -jnp.mean(fake)
