"""Tiles against diffusers' AutoencoderDC after `enable_tiling`, where tiles do not divide the picture."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from test_autoencoder_parity import make_pair, our_params

from sana_jax.models import autoencoder_tiles
from sana_jax.models.autoencoder_tiles import decode_in_tiles, encode_in_tiles

pytestmark = pytest.mark.parity

TILES = (32, 24)
# 88 rows: tiles of 32, 32, 32 and 16, the last of which is all seen by the one before; 60 columns: 32, 32, 12.
HEIGHT, WIDTH = 88, 60


@functools.cache
def diffusers_results():
    theirs = copy.deepcopy(make_pair("sana")[0])
    theirs.enable_tiling(TILES[0], TILES[0], TILES[1], TILES[1])
    images = np.random.default_rng(1).uniform(-1, 1, (2, HEIGHT, WIDTH, 3)).astype(np.float32)
    with torch.no_grad():
        latents = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent
        decoded = theirs.decode(latents).sample
    return images, *(x.numpy().transpose(0, 2, 3, 1) for x in (latents, decoded))


def errors():
    """Largest difference over the range of diffusers' values, of latents and of the picture."""
    _, tensors, module = make_pair("sana")
    params = our_params(module, tensors)
    images, latents, decoded = diffusers_results()
    ours = (
        jax.jit(lambda params, x: encode_in_tiles(module, params, x, TILES))(params, jnp.asarray(images)),
        jax.jit(lambda params, x: decode_in_tiles(module, params, x, TILES))(params, jnp.asarray(latents)),
    )
    return [np.abs(mine - true).max() / np.ptp(true) for mine, true in zip(ours, (latents, decoded), strict=True)]


def test_tiles_match_diffusers_where_they_do_not_divide_the_picture():
    assert max(errors()) < 1e-4


def test_blending_one_row_and_column_less_breaks_parity(monkeypatch):
    blend = autoencoder_tiles._blend
    monkeypatch.setattr(autoencoder_tiles, "_blend", lambda *tiles, axis: blend(*tiles[:2], tiles[2] - 1, axis))
    assert max(errors()) > 1e-2
