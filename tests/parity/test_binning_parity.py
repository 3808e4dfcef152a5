"""Resolution binning against diffusers: the tables, the choice, the resize, and a whole pipeline."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion.noise import initial_noise
from sana_jax.sampling import aspect_buckets
from sana_jax.sampling.cover_crop import cover_and_crop

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana import pipeline_sana
from tiny_diffusers import save_tiny

TABLES = {
    16: pipeline_sana.ASPECT_RATIO_512_BIN,
    32: pipeline_sana.ASPECT_RATIO_1024_BIN,
    64: ASPECT_RATIO_2048_BIN,
    128: pipeline_sana.ASPECT_RATIO_4096_BIN,
}


@pytest.mark.parametrize("sample_size", TABLES)
def test_the_tables_are_those_of_diffusers(sample_size):
    expected = {float(ratio): tuple(map(int, size)) for ratio, size in TABLES[sample_size].items()}
    assert aspect_buckets.buckets(sample_size) == expected


@pytest.mark.parametrize("sample_size", TABLES)
def test_the_chosen_bucket_is_that_of_diffusers(sample_size):
    sizes = [(100, w) for w in range(10, 1200)] + [(h, 100) for h in range(10, 1200)]
    for height, width in sizes:
        expected = PixArtImageProcessor.classify_height_width_bin(height, width, TABLES[sample_size])
        assert aspect_buckets.nearest_bucket(height, width, sample_size) == expected, (height, width)


def test_another_order_of_sides_or_measure_of_nearness_is_noticed():
    table = {float(ratio): tuple(map(int, size)) for ratio, size in TABLES[32].items()}
    assert aspect_buckets.buckets(32) != {ratio: size[::-1] for ratio, size in table.items()}

    def nearest_by_logarithm(height, width):
        return table[min(table, key=lambda ratio: abs(math.log(ratio * width / height)))]

    widths = range(10, 1200)
    assert any(aspect_buckets.nearest_bucket(100, w, 32) != nearest_by_logarithm(100, w) for w in widths)


@pytest.mark.parametrize(
    "drawn,size",
    [((48, 64), (37, 51)), ((48, 64), (100, 90)), ((64, 48), (64, 31)), ((32, 96), (33, 97)), ((40, 40), (7, 39))],
)
def test_resize_and_crop_is_that_of_diffusers(drawn, size):
    pictures = np.random.default_rng(0).normal(size=(2, *drawn, 3)).astype(np.float32)
    theirs = PixArtImageProcessor.resize_and_crop_tensor(
        torch.from_numpy(pictures).permute(0, 3, 1, 2), size[1], size[0]
    )
    expected = theirs.permute(0, 2, 3, 1).numpy()  # its positions are float32, ours are exact
    np.testing.assert_allclose(cover_and_crop(jnp.asarray(pictures), *size), expected, atol=5e-5)
    assert np.abs(cover_and_crop(jnp.asarray(pictures[:, ::-1]), *size) - expected).max() > 0.1


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A model of the 512 family: 16x16 latents and an autoencoder of factor 32."""
    path = tmp_path_factory.mktemp("binned")
    stages = dict(
        encoder_block_out_channels=(4, 4, 4, 4, 8, 8),
        decoder_block_out_channels=(4, 4, 4, 4, 8, 8),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_block_types=("ResBlock",) * 6,
        decoder_block_types=("ResBlock",) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
    )
    own = {"complex_human_instruction": None, "max_sequence_length": 12}
    pipe = save_tiny(
        diffusers.SanaPipeline, path, transformer={"sample_size": 16}, autoencoder=stages, own=own, std=0.3
    )
    return pipe, path


@pytest.mark.parametrize("height,width", [(301, 499), (600, 450)])
def test_a_binned_picture_is_that_of_diffusers(theirs, ours, height, width, measured):
    generated = ours.generated_size(height, width)
    noise = np.asarray(initial_noise(0, np.arange(1), ours.latent_shape(*generated)))
    arguments = dict(num_inference_steps=2, guidance_scale=3.0, height=height, width=width, output_type="np")
    expected = theirs[0](
        "a red apple",
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        max_sequence_length=12,
        complex_human_instruction=None,
        **arguments,
    ).images
    pictures = ours("a red apple", latents=noise, **arguments)
    assert pictures.shape == expected.shape == (1, height, width, 3)
    measured("SANA pipeline", "pictures with resolution binning, of 255", np.abs(pictures - expected).max() * 255, 2)
    assert np.abs(pictures[:, :, ::-1] - expected).max() * 255 > 2
    assert expected.std() > 0.05


def test_latents_are_handed_out_at_the_size_they_are_drawn_at(ours):
    arguments = dict(num_inference_steps=1, height=301, width=499, output_type="latent")
    latents = ours("a red apple", **arguments)
    assert latents.shape == (1, *ours.latent_shape(*ours.generated_size(301, 499)))
