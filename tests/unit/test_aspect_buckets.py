"""Which size is drawn for which request, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.sampling import aspect_buckets
from sana_jax.sampling.cover_crop import cover_and_crop


@pytest.mark.parametrize("sample_size,count", [(16, 33), (32, 33), (64, 40), (128, 40)])
def test_every_bucket_has_about_the_trained_area_and_its_ratio(sample_size, count):
    table = aspect_buckets.buckets(sample_size)
    assert len(table) == count and list(table) == sorted(table)
    for ratio, (height, width) in table.items():
        assert height % 32 == width % 32 == 0
        assert abs(height / width - ratio) < 0.03 * ratio
        assert 0.85 < height * width / (32 * sample_size) ** 2 < 1.1


def test_a_request_gets_the_bucket_of_the_nearest_ratio_whatever_its_size():
    assert aspect_buckets.nearest_bucket(1000, 1000, 32) == (1024, 1024)
    assert aspect_buckets.nearest_bucket(9, 16, 32) == (768, 1344)
    assert aspect_buckets.nearest_bucket(9, 16, 16) == (384, 672)
    assert aspect_buckets.nearest_bucket(100, 1, 128) == (8192, 2048)


def test_public_sizes_are_binned_unless_the_call_says_otherwise():
    check = aspect_buckets.check_binning
    assert check(None, 32, 32) and check(True, 128, 32) and not check(False, 32, 32)
    assert not check(None, 4, 16) and not check(False, 4, 16) and not check(None, 32, 8)


@pytest.mark.parametrize("sample_size,factor", [(4, 32), (32, 16)])
def test_binning_a_model_without_a_table_is_refused(sample_size, factor):
    with pytest.raises(ValueError, match=f"this one has sample_size {sample_size} and factor {factor}. Switch binning"):
        aspect_buckets.check_binning(True, sample_size, factor)
    if factor == 32:
        with pytest.raises(ValueError, match="sample_size=4 has no table"):
            aspect_buckets.buckets(sample_size)


def test_sizes_must_fit_only_without_binning():
    sizes = {"sample_size": 32, "multiple": 32}
    assert aspect_buckets.generated_size(1001, 999, binning=True, **sizes) == (1024, 1024)
    assert aspect_buckets.generated_size(64, 96, binning=False, **sizes) == (64, 96)
    with pytest.raises(ValueError, match="height 1001 is not a positive multiple of 32; use 992 or 1024."):
        aspect_buckets.generated_size(1001, 999, binning=False, **sizes)
    with pytest.raises(ValueError, match="width 0: at least 1 pixel is needed."):
        aspect_buckets.generated_size(1001, 0, binning=True, **sizes)


def test_the_drawn_size_is_handed_out_untouched():
    picture = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 6, 3)), jnp.float32)
    assert cover_and_crop(picture, 4, 6) is picture


def test_a_crop_alone_takes_the_centre():
    picture = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 8, 3)), jnp.float32)
    np.testing.assert_array_equal(cover_and_crop(picture, 5, 3), picture[:, :, 2:5])


def test_rounding_never_leaves_the_picture_too_small():
    """Of some d and s, d * (s / d) is below s in floating point: diffusers then loses a column and its crop fails."""
    cases = [(d, s) for d in range(160, 2048, 32) for s in range(1, d) if int(d * (s / d)) < s]
    assert cases
    drawn, size = cases[0]
    ramp = jnp.tile(jnp.arange(drawn, dtype=jnp.float32)[None, None, :, None], (1, drawn, 1, 1))
    out = np.asarray(cover_and_crop(ramp, size, size))
    assert out.shape == (1, size, size, 1)
    expected = (np.arange(size) + 0.5) * drawn / size - 0.5
    np.testing.assert_allclose(out[0, 0, :, 0], expected, atol=1e-3)
