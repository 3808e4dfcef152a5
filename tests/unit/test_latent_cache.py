"""Cached latents are those that the training step would compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.data import latent_cache, picture_set
from sana_jax.data.loader import LoaderConfig, make_loader
from sana_jax.models.autoencoder import Autoencoder
from tests import tiny_run


@pytest.fixture(scope="module")
def run():
    module = Autoencoder(tiny_run.AUTOENCODER)
    params = module.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    calls = []
    encode = jax.jit(lambda x: module.apply({"params": params}, x, method="encode"))

    def counted(images):
        calls.append(len(images))
        return np.asarray(encode(images))

    return counted, calls


def open_both(tmp_path, encode, digest="weights", backgrounds=("white", "red", "blue")):
    config = LoaderConfig(image_size=16, batch_size=24, split="heldout", backgrounds=backgrounds)
    pictures = picture_set.open_set(split="heldout", image_size=16)
    cache = latent_cache.open_latent_cache(tmp_path, pictures, config.backgrounds, encode, digest)
    return cache, make_loader(config, seed=3)


def test_the_cache_gives_what_encoding_the_batch_gives(tmp_path, run):
    encode, _ = run
    cache, batches = open_both(tmp_path, encode)
    batch = next(batches)
    got, wanted = cache(batch["indices"], batch["backgrounds"]), encode(batch["images"])
    np.testing.assert_allclose(got, wanted, atol=2e-3 * np.abs(wanted).max())
    assert len(set(batch["backgrounds"])) == 3
    wrong = cache(batch["indices"], ["white"] * 24)
    assert np.abs(wrong - wanted).max() > 0.1


def test_a_second_run_reads_the_file_and_other_weights_get_their_own(tmp_path, run):
    encode, calls = run
    open_both(tmp_path, encode)
    calls.clear()
    open_both(tmp_path, encode)
    assert not calls
    open_both(tmp_path, encode, digest="other weights")
    open_both(tmp_path, encode, backgrounds=("red", "blue"))
    assert calls and len(list(tmp_path.glob("*.npy"))) == 3


def test_an_interrupted_run_leaves_no_file_that_would_be_read_and_the_next_goes_on_from_there(tmp_path, run):
    encode, calls = run

    def failing(images):
        if len(calls) > 3:
            raise KeyboardInterrupt
        return encode(images)

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        open_both(tmp_path, failing)
    assert not [file for file in tmp_path.iterdir() if not file.name.startswith(".")]
    cache, _ = open_both(tmp_path, encode)
    assert len(calls) == -(-len(cache.latents) // 128), "each batch once"
    assert len(list(tmp_path.iterdir())) == 1
    assert np.isfinite(cache.latents).all() and np.abs(np.asarray(cache.latents)).max(axis=(1, 2, 3)).min() > 0


def test_latents_beyond_float16_are_refused(tmp_path):
    with pytest.raises(FloatingPointError, match="cache_latents=False"):
        open_both(tmp_path, lambda images: np.full((len(images), 4, 4, 8), 1e5, np.float32))
    assert not list(tmp_path.iterdir())


def test_what_an_interrupted_run_with_other_weights_left_is_removed(tmp_path, run):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pictures = picture_set.open_set(split="heldout", image_size=16)
        latent_cache.open_latent_cache(tmp_path, pictures, ("white", "red"), run[0], "other", interrupt)
    assert len(list(tmp_path.iterdir())) == 2
    open_both(tmp_path, run[0])
    assert len(list(tmp_path.iterdir())) == 1


def test_two_writers_of_one_cache_do_not_meet(tmp_path, run):
    encode, _ = run
    others = []

    def while_another_writes(images):
        if not others:
            others.append(None)
            others.append(open_both(tmp_path, encode)[0])
        return encode(images)

    cache, _ = open_both(tmp_path, while_another_writes)
    np.testing.assert_array_equal(cache.latents, others[1].latents)
    assert len(list(tmp_path.iterdir())) == 1


def test_photographs_have_one_version(tmp_path, run):
    from PIL import Image

    from sana_jax.data import folder_build

    encode, _ = run
    source = tmp_path / "pictures"
    source.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 20), (80 * number, 10, 200)).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(f"picture {number}")
    folder_build.build(source, tmp_path / "set")
    pictures = picture_set.open_set(tmp_path / "set", image_size=16)
    cache = latent_cache.open_latent_cache(tmp_path / "latents", pictures, ("white", "red"), encode, "weights")
    batch = next(make_loader(LoaderConfig(path=str(tmp_path / "set"), image_size=16, batch_size=3), seed=0))
    wanted = encode(batch["images"])
    np.testing.assert_allclose(cache(batch["indices"], batch["backgrounds"]), wanted, atol=2e-3 * np.abs(wanted).max())
    assert len(cache.latents) == 3
    Image.new("RGB", (20, 20), "white").save(source / "0.png")
    folder_build.build(source, tmp_path / "set", overwrite=True)
    pictures = picture_set.open_set(tmp_path / "set", image_size=16)
    again = latent_cache.open_latent_cache(tmp_path / "latents", pictures, ("white", "red"), encode, "weights")
    assert np.any(again.latents[0] != cache.latents[0]), "another picture of the same name"
    np.testing.assert_array_equal(again.latents[1:], cache.latents[1:])
