"""Decoding, resizing and compositing against plain statements of the same."""

import io

import numpy as np
import pytest
from PIL import Image

from sana_jax.data import transforms
from sana_jax.data.emoji import BACKGROUNDS


def _file(array, form="PNG", **options):
    out = io.BytesIO()
    Image.fromarray(array).save(out, form, **options)
    return out.getvalue()


def test_backgrounds_and_opaque_pixels_come_through_exactly():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[1:3, 1:3] = (10, 200, 30, 255)
    rgba[0, 0, :3] = 99  # invisible
    for colour in BACKGROUNDS.values():
        image = transforms.composite(rgba, np.array(colour, np.uint8))
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image[1:3, 1:3], np.broadcast_to((10, 200, 30), (2, 2, 3)))
        outside = rgba[..., 3] == 0
        np.testing.assert_array_equal(image[outside], np.broadcast_to(colour, (outside.sum(), 3)))


def test_half_transparent_pixels_are_mixed_in_proportion():
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (2, 5, 5, 4), dtype=np.uint8)
    colours = rng.integers(0, 256, (2, 3), dtype=np.uint8)
    alpha = rgba[..., 3:] / 255.0
    expected = alpha * rgba[..., :3] + (1 - alpha) * colours[:, None, None]
    np.testing.assert_allclose(transforms.composite(rgba, colours), expected, atol=0.5 + 1e-4)


def test_a_wide_photograph_is_cropped_in_the_middle():
    array = np.zeros((10, 30, 3), np.uint8)
    array[:, 10:20] = (255, 0, 0)
    out = transforms.resize_and_crop(transforms.decode(_file(array)), (10, 10))
    np.testing.assert_array_equal(out, np.broadcast_to((255, 0, 0, 255), (10, 10, 4)))


@pytest.mark.parametrize("shape", [(40, 40), (41, 67), (67, 41), (7, 9)])
def test_every_shape_becomes_the_square_asked_for(shape):
    rng = np.random.default_rng(1)
    out = transforms.resize_and_crop(
        transforms.decode(_file(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))), (16, 16)
    )
    assert out.shape == (16, 16, 4) and (out[..., 3] == 255).all()


GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_common_mode_decodes_to_the_same_greys(mode):
    # Sixteen bits: 257 times the value, which is how 0..255 fills 0..65535.
    picture = Image.fromarray(GREYS * np.uint16(257)) if mode == "I;16" else Image.fromarray(GREYS).convert(mode)
    assert picture.mode == mode
    out = io.BytesIO()
    picture.save(out, "PNG")
    got = transforms.resize_and_crop(transforms.decode(out.getvalue()), (16, 16))
    np.testing.assert_array_equal(got[..., :3], np.broadcast_to(GREYS[..., None], (16, 16, 3)))
    assert (got[..., 3] == 255).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_of_no_known_range_are_refused(mode):
    out = io.BytesIO()
    Image.new(mode, (8, 8), 7).save(out, "TIFF")
    with pytest.raises(ValueError, match=f"mode {mode}, whose range is unknown; save it in 8 bits a channel"):
        transforms.decode(out.getvalue())


def test_a_file_whose_palette_has_a_transparent_colour_keeps_it():
    picture = Image.fromarray(GREYS).convert("P")
    out = io.BytesIO()
    picture.save(out, "PNG", transparency=7)
    alpha = transforms.resize_and_crop(transforms.decode(out.getvalue()), (16, 16))[..., 3]
    assert alpha.ravel().tolist() == [255] * 7 + [0] + [255] * 248


def test_a_photograph_is_resized_as_a_drawing_without_transparency():
    rgb = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    rgba = np.concatenate([rgb, np.full((40, 50, 1), 255, np.uint8)], -1)
    photo, drawing = (transforms.resize_and_crop(transforms.decode(_file(array)), (24, 24)) for array in (rgb, rgba))
    np.testing.assert_array_equal(photo, drawing)
    white = np.full(3, 255, np.uint8)
    drawing = drawing.copy()
    drawing[0, 0, 3] = 254  # the other way through `composite`
    np.testing.assert_array_equal(transforms.composite(photo, white)[1:], transforms.composite(drawing, white)[1:])


def test_downscaling_averages_instead_of_picking_pixels():
    checkers = np.zeros((64, 64, 3), np.uint8)
    checkers[::2, ::2] = checkers[1::2, 1::2] = 255
    out = transforms.resize_and_crop(transforms.decode(_file(checkers)), (16, 16))
    assert np.abs(out[2:-2, 2:-2, :3].astype(int) - 128).max() <= 8


def test_invisible_colours_do_not_bleed_into_outlines():
    array = np.zeros((32, 32, 4), np.uint8)
    array[..., 0] = 255  # invisible red everywhere
    array[8:24, 8:24] = (0, 0, 255, 255)
    out = transforms.resize_and_crop(transforms.decode(_file(array)), (13, 13))
    assert out[out[..., 3] > 8][:, 0].max() <= 8


def test_a_photograph_lying_on_its_side_is_turned_upright():
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    upright = transforms.decode(_file(array, "PNG", exif=exif))
    assert upright.size == (20, 40)
    assert np.asarray(upright)[5, 10, 0] == 255 and np.asarray(upright)[35, 10, 0] == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_the_size_that_a_files_head_says_is_that_of_the_decoded_picture(kind, orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    file = _file(np.zeros((20, 40, 3), np.uint8), kind, exif=exif)
    width, height = transforms.decode(file).size
    assert transforms.size_of(file) == (height, width) == ((40, 20) if orientation in (6, 8) else (20, 40))


@pytest.mark.parametrize("file", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_the_size_of_no_picture_is_not_known(file):
    assert transforms.size_of(file) == (0, 0)


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (8, 32)])
@pytest.mark.parametrize("shape", [(30, 30), (31, 90), (90, 31), (5, 4)])
def test_of_a_picture_that_covers_a_size_the_middle_remains(shape, size):
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    ramps = np.stack([rows / shape[0], columns / shape[1], 0 * rows], -1) * 255
    out = transforms.resize_and_crop(transforms.decode(_file(ramps.astype(np.uint8))), size)[..., :2] / 255
    scale = max(size[0] / shape[0], size[1] / shape[1])  # the file's pixels become so large
    shown = size[0] / (shape[0] * scale), size[1] / (shape[1] * scale)
    assert max(shown) == pytest.approx(1)
    inner = slice(2, -2)  # a cubic filter bends the ends of a ramp
    for axis in range(2):
        wanted = 0.5 + shown[axis] * ((np.arange(size[axis]) + 0.5) / size[axis] - 0.5)
        got = out[..., axis].mean(1 - axis)
        np.testing.assert_allclose(got[inner], wanted[inner], atol=0.75 / min(shape) + 1 / 255)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, 0), (0, -3), (-1, 2), (3, 3)])
def test_shifting_moves_pixels_and_brings_in_transparency(down, right):
    rgba = np.random.default_rng(2).integers(1, 256, (6, 6, 4), dtype=np.uint8)
    expected = np.zeros_like(rgba)
    for y in range(6):
        for x in range(6):
            if 0 <= y - down < 6 and 0 <= x - right < 6:
                expected[y, x] = rgba[y - down, x - right]
    np.testing.assert_array_equal(transforms.shift(rgba, down, right), expected)
