"""LPIPS (Zhang et al., 2018), for those who have its files; nothing here is downloaded.

Two files make it: torchvision's VGG-16 (`vgg16-397923af.pth`) and the authors' channel weights (`weights/v0.1/vgg.pth`
of the package `lpips`). The features are those after the last ReLU of each of VGG's five stages.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.weights import torch_pickle

# Places of the convolutions in torchvision's `features`, stage by stage; a max-pool stands between the stages.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
CHANNELS = (64, 128, 256, 512, 512)
SHIFT = (-0.030, -0.088, -0.188)  # of pictures in -1..1, the authors' way to ImageNet's normalisation
SCALE = (0.458, 0.448, 0.450)


def load(vgg: str | pathlib.Path, heads: str | pathlib.Path) -> dict:
    """Parameters from the two files: {"stages": convolutions by stage, "channel_weights": one vector per stage}.

    Raises:
      FileNotFoundError: a path is empty or does not exist.
      ValueError: a file lacks a tensor.
    """
    for name, path in (("lpips_vgg", vgg), ("lpips_heads", heads)):
        if not path or not pathlib.Path(path).is_file():
            raise FileNotFoundError(
                f"config.{name}={str(path)!r} is no file. LPIPS needs torchvision's vgg16-397923af.pth and lpips's "
                "weights/v0.1/vgg.pth; without them use config.perceptual='efficientnet'."
            )
    convolutions, lines = torch_pickle.load(vgg), torch_pickle.load(heads)
    try:
        stages = [
            [
                {
                    "kernel": np.asarray(convolutions[f"features.{i}.weight"], np.float32).transpose(2, 3, 1, 0),
                    "bias": np.asarray(convolutions[f"features.{i}.bias"], np.float32),
                }
                for i in stage
            ]
            for stage in STAGES
        ]
        weights = [np.asarray(lines[f"lin{i}.model.1.weight"], np.float32).reshape(-1) for i in range(len(STAGES))]
    except KeyError as error:
        raise ValueError(f"{vgg} and {heads} are not LPIPS's two files: no tensor {error}.") from error
    return {"stages": stages, "channel_weights": weights}


def shapes() -> dict:
    """Shapes and dtypes of what `load` returns."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    stages, before = [], 3
    for stage, channels in zip(STAGES, CHANNELS, strict=True):
        inputs = (before,) + (channels,) * (len(stage) - 1)
        stages.append([{"kernel": array(3, 3, width, channels), "bias": array(channels)} for width in inputs])
        before = channels
    return {"stages": stages, "channel_weights": [array(channels) for channels in CHANNELS]}


def features(params: dict, images: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w C"]]:
    """VGG-16's maps at 1/1, 1/2, 1/4, 1/8 and 1/16 of the side, for pictures in -1..1."""
    x = (images - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
    maps = []
    for stage in params["stages"]:
        if maps:
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        for layer in stage:
            x = jax.lax.conv_general_dilated(
                x, layer["kernel"].astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = nn.relu(x + layer["bias"].astype(x.dtype))
        maps.append(x)
    return maps
