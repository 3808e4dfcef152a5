"""Cached latents are those that the training step would compute."""

import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.bit_depth import from_eight_bits
from sana_jax.data import latent_cache, picture_set
from sana_jax.data.loader import LoaderConfig, make_loader
from sana_jax.models.autoencoder import Autoencoder
from tests import tiny_run


@pytest.fixture(scope="module")
def run():
    module = Autoencoder(tiny_run.AUTOENCODER)
    params = module.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    calls = []
    encode = jax.jit(lambda x: module.apply({"params": params}, from_eight_bits(x), method="encode"))

    def counted(images):
        calls.append(len(images))
        return np.asarray(encode(images))

    return counted, calls


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Several files, the last of them short, and several batches in each, the last of them short."""
    monkeypatch.setattr(latent_cache, "CHUNK", 300)


def open_cache(tmp_path, encode, digest="weights", backgrounds=("white", "red", "blue"), **arguments):
    pictures = picture_set.open_set(split="heldout", image_size=16)
    return latent_cache.open_latent_cache(tmp_path, pictures, backgrounds, encode, digest, **arguments)


def files(path):
    return sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())


def all_latents(cache):
    return np.concatenate([np.load(cache.file(chunk)) for chunk in range(-(-len(cache) // latent_cache.CHUNK))])


def test_the_cache_gives_what_encoding_the_batch_gives(tmp_path, run):
    encode, calls = run
    calls.clear()
    cache = open_cache(tmp_path, encode)
    assert len(files(tmp_path)) > 2 and set(calls) == {128}, "one shape is compiled"
    config = LoaderConfig(image_size=16, batch_size=24, split="heldout", backgrounds=("white", "red", "blue"))
    batch, without = next(make_loader(config, seed=3)), next(make_loader(config, seed=3, images=False))
    assert without["images"] is None
    for name in ("indices", "backgrounds", "captions", "keys"):
        np.testing.assert_array_equal(without[name], batch[name])
    got, wanted = cache(batch["indices"], batch["backgrounds"]), encode(batch["images"])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=2e-3 * np.abs(wanted).max())
    assert len(set(batch["backgrounds"])) == 3
    wrong = cache(batch["indices"], ["white"] * 24)
    assert np.abs(wrong - wanted).max() > 0.1


def test_a_second_run_reads_the_files_and_other_weights_get_their_own(tmp_path, run):
    encode, calls = run
    open_cache(tmp_path, encode)
    calls.clear()
    open_cache(tmp_path, encode)
    assert not calls
    open_cache(tmp_path, encode, digest="other weights")
    open_cache(tmp_path, encode, backgrounds=("red", "blue"))
    assert calls and len(list(tmp_path.iterdir())) == 3


def test_after_an_interrupted_run_the_next_encodes_what_is_not_there(tmp_path, run):
    encode, calls = run
    batches = []

    def interrupt():
        batches.append(None)
        if len(batches) == 5:  # of three for each file
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path, encode, between=interrupt)
    assert [file.name for file in files(tmp_path)] == ["00000.npy"], "one file is whole, and nothing else is there"
    calls.clear()
    cache = open_cache(tmp_path, encode)
    whole, rest = divmod(len(cache) - 300, 300)
    assert len(calls) == 3 * whole + -(-rest // 128)
    latents = all_latents(cache)
    assert latents.shape == (len(cache), 4, 4, 8) and np.abs(latents).max(axis=(1, 2, 3)).min() > 0
    np.testing.assert_array_equal(latents, all_latents(open_cache(tmp_path / "undisturbed", encode)))


def test_latents_beyond_float16_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"or the 127 after it: latents beyond float16 .*cache_latents=False"):
        open_cache(tmp_path, lambda images: np.full((len(images), 4, 4, 8), 1e5, np.float32))
    assert not files(tmp_path)


def test_two_runs_at_once_do_not_meet(tmp_path, run):
    encode, _ = run
    others = []

    def while_another_writes(images):
        if not others:
            others.append(None)
            others.append(all_latents(open_cache(tmp_path, encode)))
        return encode(images)

    cache = open_cache(tmp_path, while_another_writes)
    np.testing.assert_array_equal(all_latents(cache), others[1])


def test_files_of_another_process_that_do_not_show_up_are_an_error(tmp_path, run, monkeypatch):
    monkeypatch.setattr(latent_cache, "_write", lambda file, latents: None)
    monkeypatch.setattr(latent_cache, "_PATIENCE", 0.0)
    batches = []
    with pytest.raises(FileNotFoundError, match="^1 files of latents, .*--workdir must be a folder that all hosts see"):
        open_cache(tmp_path, run[0], between=lambda: batches.append(None))
    assert len(batches) == 3, "it is noticed after the first file"


def test_more_files_than_a_process_may_open_can_be_read(tmp_path, run, monkeypatch):
    monkeypatch.setattr(latent_cache, "CHUNK", 1)
    cache = open_cache(tmp_path, run[0], backgrounds=("white",), batch_size=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/dev/fd"))
    assert len(cache) > 300
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 300, hard))
    try:
        found = cache(np.arange(len(cache)), ["white"] * len(cache))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_array_equal(found, all_latents(cache))


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
    assert len(cache) == 3
    Image.new("RGB", (20, 20), "white").save(source / "0.png")
    folder_build.build(source, tmp_path / "set", overwrite=True)
    pictures = picture_set.open_set(tmp_path / "set", image_size=16)
    again = latent_cache.open_latent_cache(tmp_path / "latents", pictures, ("white", "red"), encode, "weights")
    assert np.any(all_latents(again)[0] != all_latents(cache)[0]), "another picture of the same name"
    np.testing.assert_array_equal(all_latents(again)[1:], all_latents(cache)[1:])
