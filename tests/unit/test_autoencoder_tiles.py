"""Tiles as diffusers has them: what they change, and what the pipeline says of them."""

import jax
import numpy as np
import pytest
from test_autoencoder_strips import CONFIGS, HEIGHT, in_strips, plain, random_params
from tiny_pipeline import tiny_parts

from sana_jax import SanaPipeline
from sana_jax.models import autoencoder_tiles
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.autoencoder_tiles import check_tiles, decode_in_tiles
from sana_jax.sampling import program

SANA = CONFIGS["sana"]


def in_tiles(tiles):
    run = jax.jit(lambda params, x: decode_in_tiles(Autoencoder(SANA), params, x, tiles))
    return np.asarray(run(random_params(SANA), plain(SANA, "decode")[0]))


def test_tiles_change_the_picture_where_strips_do_not():
    expected = plain(SANA, "decode")[1]
    scale = np.abs(expected).max()
    assert np.abs(in_strips(SANA, "decode", 5) - expected).max() / scale < 1e-5
    found = in_tiles((48, 40))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() / scale > 0.05


def test_one_tile_over_all_is_the_plain_call():
    np.testing.assert_array_equal(in_tiles((HEIGHT, 8)), plain(SANA, "decode")[1])


@pytest.mark.parametrize("tiles", [(512, 450), (500, 448), (448, 512), (512, 0)])
def test_tiles_that_are_none_are_refused(tiles):
    with pytest.raises(ValueError, match=r"multiples of 8, .* diffusers takes \(512, 448\)"):
        check_tiles(SANA, tiles)


def test_the_pipeline_encodes_and_decodes_in_tiles_on_request(monkeypatch):
    called = []
    for name in ("encode_in_tiles", "decode_in_tiles"):

        def record(*arguments, tiles, name=name):
            called.append((name, tiles))
            return getattr(autoencoder_tiles, name)(*arguments, tiles)

        monkeypatch.setattr(program, name, record)
    start = np.zeros((16, 16, 3), np.float32)
    SanaPipeline(tiny_parts())("a red apple", image=start, num_inference_steps=1, autoencoder_tiles=(8, 8))
    assert called == [("encode_in_tiles", (8, 8)), ("decode_in_tiles", (8, 8))]


def test_the_pipeline_refuses_tiles_before_anything_is_computed(monkeypatch):
    pipe = SanaPipeline(tiny_parts())
    monkeypatch.setattr(pipe, "programs", None)
    with pytest.raises(ValueError, match="autoencoder_tiles and decode_strips exclude each other"):
        pipe("a red apple", autoencoder_tiles=(8, 8), decode_strips=1)
    with pytest.raises(ValueError, match=r"tiles=\(8, 6\): give \(side, distance\) in pixels, multiples of 4"):
        pipe("a red apple", autoencoder_tiles=(8, 6))
