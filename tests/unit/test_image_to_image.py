"""img2img: the picture it starts from, the level it starts at, and what is refused."""

import jax
import numpy as np
import pytest
from absl import logging
from PIL import Image
from tiny_pipeline import tiny_parts

from sana_jax import SanaPipeline
from sana_jax.diffusion import solvers
from sana_jax.diffusion.noise import initial_noise
from sana_jax.sampling.image_to_image import first_step, prepare_image


@pytest.fixture(scope="module")
def pipe():
    return SanaPipeline(tiny_parts())


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "num_steps,strength,start",
    [(20, 0.6, 8), (20, 1.0, 0), (20, 0.01, 19), (10, 0.9, 1), (2, 0.6, 0), (2, 0.5, 1), (1, 0.3, 0), (4, 1e-20, 3)],
)
def test_the_first_step_is_the_integer_part_of_the_steps_that_strength_leaves_out(num_steps, strength, start):
    assert solvers.start_step(num_steps, strength) == start


def test_a_strength_that_drowns_the_image_in_noise_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    assert (first_step(2, 0.6), first_step(1, 0.6)) == (0, 0)
    assert (first_step(2, 0.5), first_step(2, 1.0), first_step(20, 0.6)) == (1, 0, 8)
    assert [text.split("; ")[1] for text in said] == [
        "use a strength of at most 0.5, or more steps.",
        "use more steps.",
    ]


@pytest.mark.parametrize("make", [solvers.flow_dpm, solvers.flow_euler])
def test_a_perfect_model_brings_the_picture_back_from_any_level(make):
    """Along the straight path between x0 and the noise the velocity is their difference, and every solver is exact."""
    x0, noise = (jax.random.normal(jax.random.key(i), (1, 2, 2, 3)) for i in (0, 1))
    for start in (0, 3, 7):
        out = solvers.sample(lambda x, t: noise - x0, noise, make(8, 3.0, start=start), x0=x0)
        np.testing.assert_allclose(out, x0, atol=1e-5)


def test_the_history_of_dpm_begins_empty_where_img2img_begins():
    levels = solvers.flow_dpm(8, 3.0, start=3).levels
    assert levels.weights[0, 1] == 0 and levels.weights[1, 1] != 0
    np.testing.assert_array_equal(levels.weights[1:], solvers.flow_dpm(8, 3.0).levels.weights[4:])


def test_third_order_lowers_its_last_steps_by_the_number_of_all_steps():
    """As diffusers, whose scheduler counts all N where it begins in the middle."""
    whole = solvers.flow_dpm(20, 3.0, order=3).levels.weights
    np.testing.assert_array_equal(solvers.flow_dpm(20, 3.0, order=3, start=12).levels.weights[-2:], whole[-2:])


@pytest.mark.parametrize("solver", ["flow_dpm", "flow_euler"])
def test_latents_are_solved_from_the_noised_encoding_with_the_steps_that_are_left(picture, solver):
    """A model of velocity 0 leaves Flow-Euler's first point x = (1 - sigma) x0 + sigma noise where it is."""
    parts = tiny_parts()
    zeros = jax.tree.map(np.zeros_like, parts.transformer[1]["proj_out"])
    still = SanaPipeline(
        parts._replace(transformer=(parts.transformer[0], {**parts.transformer[1], "proj_out": zeros}))
    )
    seen = []
    out = still(
        "fox",
        image=picture,
        strength=0.5,
        num_inference_steps=4,
        solver=solver,
        output_type="latent",
        seed=3,
        progress=lambda *done: seen.append(done),
    )
    assert seen == [(1, 2), (2, 2)]
    module, params = parts.autoencoder
    encode = jax.jit(lambda params, x: module.apply({"params": params}, x, method="encode"))
    x0 = 0.7 * encode(params, prepare_image("image", picture, 16, 16, 1))
    sigma = (solvers.dpm_sigmas if solver == "flow_dpm" else solvers.euler_sigmas)(4, 3.0)[2]
    expected = (1 - sigma) * x0 + sigma * initial_noise(3, np.arange(1), (4, 4, 8))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_each_prompt_may_have_its_picture(pipe, picture):
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    arguments = dict(output_type="latent", strength=0.4, guidance_scale=1.0)
    both = pipe(["fox", "pear"], image=[picture, other], num_images_per_prompt=2, seed=1, **arguments)
    last = initial_noise(1, np.arange(3, 4), (4, 4, 8))
    np.testing.assert_allclose(both[3:], pipe("pear", image=other, latents=last, **arguments), rtol=1e-4, atol=1e-5)
    array = np.asarray(other, np.float32) / 255
    np.testing.assert_array_equal(
        pipe("pear", image=array, latents=last, **arguments), pipe("pear", image=other, latents=last, **arguments)
    )


def test_pictures_are_resized_and_transparent_ones_laid_on_white(picture):
    assert prepare_image("image", picture.resize((40, 20)), 16, 24, 3).shape == (1, 16, 24, 3)
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    np.testing.assert_array_equal(prepare_image("image", clear, 4, 4, 1), np.ones((1, 4, 4, 3), np.float32))
    half = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
    np.testing.assert_array_equal(
        prepare_image("image", half, 4, 4, 1), prepare_image("image", Image.new("L", (4, 4), 128), 4, 4, 1)
    )
    grey = Image.new("L", (4, 4), 0)
    np.testing.assert_array_equal(prepare_image("image", [grey, grey], 4, 4, 2), -np.ones((2, 4, 4, 3), np.float32))


@pytest.mark.parametrize(
    "image,message",
    [
        (np.zeros((16, 16, 3), np.uint8), r"image is of the type ndarray \(uint8\); give a Pillow picture, or a float"),
        (np.zeros((8, 16, 3), np.float32), r"image has the shape \(8, 16, 3\); this call needs \(16, 16, 3\)"),
        (np.zeros((3, 16, 16), np.float32), r"image has the shape \(3, 16, 16\)"),
        (np.full((16, 16, 3), 2.0), r"image has values in 2..2; they must lie in 0..1"),
        (np.full((16, 16, 3), np.nan), r"image has values in nan..nan"),
        (Image.new("F", (16, 16)), "image has values of Pillow's mode F, whose range is unknown"),
        (np.zeros((3, 16, 16, 3), np.float32), "image is 3 pictures for 2 prompts: give one for all, or one for each"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        prepare_image("image", image, 16, 16, 2)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.5, float("nan")])
def test_a_strength_out_of_range_is_named(pipe, picture, strength, monkeypatch):
    monkeypatch.setattr(pipe, "programs", None)
    with pytest.raises(ValueError, match=f"strength {strength} is not above 0 and at most 1; 1 starts from pure noise"):
        pipe("fox", image=picture, strength=strength)


def test_strength_without_an_image_is_refused(pipe):
    with pytest.raises(ValueError, match=r"strength 0.5 is given and no image"):
        pipe("fox", strength=0.5)
