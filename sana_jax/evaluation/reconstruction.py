"""How well an autoencoder gives back pictures it has not seen."""

import jax
import numpy as np
from jaxtyping import Float, UInt8

from sana_jax.compiler_options import compiler_options

_BATCH = 64


def reconstruct(autoencoder, params, pictures: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "N H W 3"]:
    """Encodes and decodes pictures, in batches of one compiled size.

    Args:
      autoencoder: the module; its call takes and gives pictures in -1..1.
      params: its parameters.
      pictures: sides are multiples of the autoencoder's downsample factor.
    """
    options = compiler_options(jax.default_backend())
    run = jax.jit(lambda params, x: autoencoder.apply({"params": params}, x), compiler_options=options)
    parts = []
    for first in range(0, len(pictures), _BATCH):
        batch = pictures[first : first + _BATCH].astype(np.float32) / 127.5 - 1
        filled = np.zeros((min(_BATCH, len(pictures)), *batch.shape[1:]), np.float32)
        filled[: len(batch)] = batch
        parts.append(np.asarray(run(params, filled), np.float32)[: len(batch)])
    return np.rint((np.clip(np.concatenate(parts), -1, 1) + 1) * 127.5).astype(np.uint8)


def psnr(pictures: UInt8[np.ndarray, "N H W 3"], others: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, " N"]:
    r"""Peak signal-to-noise ratio of each pair in dB, $10 \log_{10}(255^2 / \mathrm{MSE})$; infinite for equal pictures."""
    error = ((pictures.astype(np.float64) - others) ** 2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)
