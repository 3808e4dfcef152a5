"""The measures that need no judge: background, descriptors, distances, reconstruction."""

import flax.linen as nn
import numpy as np
import pytest

from sana_jax.data.emoji import BACKGROUNDS
from sana_jax.evaluation import background, descriptors, reconstruction
from sana_jax.evaluation.frechet import frechet_distance
from sana_jax.evaluation.nearest import nearest


def drawing(ground, size=32, colour=(90, 200, 180)):
    """A rectangle off the middle, on a plain ground."""
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = ground
    picture[6:20, 8:28] = colour
    return picture


def test_every_palette_colour_is_recognised_under_noise():
    rng = np.random.default_rng(0)
    pictures = np.stack([drawing(colour) for colour in BACKGROUNDS.values()]).astype(float)
    noisy = np.clip(pictures + rng.normal(size=pictures.shape) * 12, 0, 255).astype(np.uint8)
    assert background.names(noisy) == list(BACKGROUNDS)


def test_a_drawing_along_the_border_does_not_hide_the_background_in_the_corners():
    picture = drawing(BACKGROUNDS["blue"], size=64)
    picture[3:-3] = BACKGROUNDS["red"]
    picture[:, 3:-3] = BACKGROUNDS["red"]
    assert background.names(picture[None]) == ["blue"]


def test_a_drawing_over_two_corners_loses_to_the_palette_colour_in_the_others():
    picture = drawing(BACKGROUNDS["pink"], size=64)
    picture[40:] = (120, 80, 40)
    assert background.names(picture[None]) == ["pink"]


def test_on_grey_takes_the_background_off_and_leaves_the_drawing():
    out = background.on_grey(np.stack([drawing(BACKGROUNDS["yellow"]), drawing(BACKGROUNDS["black"])]))
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_array_equal(out[0], drawing((128, 128, 128)))


def test_descriptors_do_not_depend_on_the_background():
    a, b = descriptors.describe(np.stack([drawing(BACKGROUNDS["white"]), drawing(BACKGROUNDS["black"])]))
    edges = slice(512, 528)  # the gradient histogram sees the outline, which is against the background
    np.testing.assert_array_equal(np.delete(a, edges), np.delete(b, edges))


def test_colours_between_bins_are_divided_among_them():
    step = 255 / 7
    pictures = np.zeros((2, 1, 2, 3), np.float32)
    pictures[0] = (2 * step, 5 * step, 0)  # in the middle of bin (2, 5, 0)
    pictures[1] = (2.25 * step, 5 * step, 0)
    first, second = descriptors.colour_histogram(pictures, np.ones((2, 1, 2), np.float32)) ** 2 * (2 + 1e-3) / 2
    bin_ = 2 * 64 + 5 * 8
    np.testing.assert_allclose(first[bin_], 1, atol=1e-4)
    np.testing.assert_allclose([second[bin_], second[bin_ + 64]], [0.75, 0.25], atol=1e-4)


def test_only_the_drawing_counts_in_the_colour_histogram():
    pictures = np.zeros((1, 2, 2, 3), np.float32)
    pictures[0, 0] = 255
    mask = np.zeros((1, 2, 2), np.float32)
    mask[0, 0] = 1
    counts = descriptors.colour_histogram(pictures, mask)[0]
    assert counts.argmax() == 511 and np.count_nonzero(counts) == 1


def test_a_flat_fill_is_in_the_lowest_gradient_bin_and_a_hard_edge_is_not():
    flat = np.full((1, 4, 4, 3), 100, np.float32)
    edge = flat.copy()
    edge[:, :, 2:] = 200
    mask = np.ones((1, 4, 4), np.float32)
    np.testing.assert_allclose(descriptors.gradient_histogram(flat, mask)[0, 0], 1, atol=1e-3)
    # of the three columns of differences, one has sqrt(3) * 100 = 173
    place = np.log1p(np.sqrt(3) * 100) / np.log1p(255 * np.sqrt(6)) * 15
    low = int(place)
    counts = descriptors.gradient_histogram(edge, mask)[0]
    np.testing.assert_allclose(counts[[0, low, low + 1]], [2 / 3, (low + 1 - place) / 3, (place - low) / 3], atol=1e-3)


def test_margins_tell_where_the_drawing_begins():
    mask = np.zeros((1, 64, 64), np.float32)
    mask[0, 5:60, 3:64] = 1
    top, bottom, left, right = descriptors.margins(mask)[0].reshape(4, 16)
    assert [int(side.argmax()) for side in (top, bottom, left, right)] == [5, 4, 3, 0]


def test_frechet_distance_is_the_textbook_formula():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5))
    b = rng.normal(size=(40, 5)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy_linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-9)


def test_frechet_distance_of_a_moved_set_is_the_squared_move():
    a = np.random.default_rng(0).normal(size=(6, 20))  # fewer pictures than features
    np.testing.assert_allclose(frechet_distance(a, a + 0.5), 20 * 0.25, rtol=1e-9)


def test_frechet_distance_refuses_sets_of_different_size():
    with pytest.raises(ValueError, match="must be equal"):
        frechet_distance(np.zeros((3, 2)), np.zeros((4, 2)))


def test_a_copied_picture_is_found_at_distance_zero():
    rng = np.random.default_rng(0)
    training = rng.normal(size=(50, 16))
    new = np.stack([training[17], rng.normal(size=16)])
    found = nearest(new, training)
    assert found.index[0] == 17
    np.testing.assert_allclose(found.distance[0], 0, atol=1e-12)
    assert found.distance[1] > 0.1


def test_psnr_is_ten_log10_of_peak_over_mean_square():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[0] += 10
    values = reconstruction.psnr(a, b)
    np.testing.assert_allclose(values[0], 10 * np.log10(255**2 / 100))
    assert np.isinf(values[1])


class Halving(nn.Module):
    """Stands for an autoencoder that gives half of what it got."""

    def __call__(self, images):
        return images / 2


def test_reconstruction_runs_every_picture_through_the_autoencoder_whatever_their_number():
    pictures = np.random.default_rng(0).integers(0, 256, (67, 2, 2, 3), dtype=np.uint8)
    out = reconstruction.reconstruct(Halving(), {}, pictures)
    expected = np.rint((pictures / 127.5 - 1) / 2 * 127.5 + 127.5)
    assert abs(out.astype(int) - expected).max() <= 1 and out.shape == pictures.shape
