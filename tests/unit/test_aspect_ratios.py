"""Pictures of several aspect ratios: sizes, which picture goes where, batches of one size."""

import collections
import io
import itertools

import jaxtyping
import numpy as np
import pytest
from PIL import Image

from sana_jax.aspect_ratios import BUCKETS_1024, buckets_of
from sana_jax.data import latent_cache, picture_set, records
from sana_jax.data.loader import LoaderConfig, make_loader
from sana_jax.data.records import Record

RATIOS = (1.67, 0.6, 1.0)
SHAPES = {"wide": (18, 30), "square": (21, 20), "tall": (50, 30)}
SIZES = {"wide": (12, 20), "square": (16, 16), "tall": (20, 12)}
COUNTS = {"wide": 12, "square": 25, "tall": 5}


def _photo(kind, number):
    """A photograph whose red value is its number in its kind; on its side in the file where that is odd."""
    pixels, exif = np.full((*SHAPES[kind], 3), (5 * number, 9, 200), np.uint8), Image.Exif()
    if number % 2:
        pixels, exif[0x0112] = pixels.swapaxes(0, 1), 6
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG", exif=exif)
    return Record(f"{kind}{number}", out.getvalue(), captions=(kind,))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "photos"
    all_photos = [_photo(kind, number) for kind, count in COUNTS.items() for number in range(count)]
    records.write_dataset(path, all_photos[::2] + all_photos[1::2], {})
    return str(path)


def _config(path, **fields):
    return LoaderConfig(**{"path": path, "image_size": 16, "aspect_ratios": RATIOS, "batch_size": 4, **fields})


def test_the_buckets_are_the_published_sizes_in_proportion():
    assert [bucket.size for bucket in buckets_of((0.57, 1.0, 1.75), 512)] == [(384, 672), (512, 512), (672, 384)]
    everything = buckets_of((bucket.ratio for bucket in BUCKETS_1024), 1024)
    assert everything == BUCKETS_1024 and len(everything) == 40
    for ratio, height, width in everything:
        assert height / width == pytest.approx(ratio, abs=0.006) and 0.9 < height * width / 2**20 <= 1


@pytest.mark.parametrize(
    "ratios, size, message",
    [
        ((1.0, 1.5), 512, "has 1.5, .* The nearest are 1.38 and 1.46"),
        ((9.0,), 512, "The nearest are 3.88 and 4.0"),
        ((0.94,), 100, "0.94, which at image_size=100 is 93.75x100 pixels. Use ratios or a size that give whole ones"),
        ((), 512, "leaves no picture"),
    ],
)
def test_a_ratio_that_cannot_be_is_an_error_with_the_fix(ratios, size, message):
    with pytest.raises(ValueError, match=message):
        LoaderConfig(aspect_ratios=ratios, image_size=size)


def test_a_ratio_that_is_no_number_is_an_error_with_an_example(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="has 'square', which is no number. Use ratios height / width"):
        LoaderConfig(aspect_ratios=("square",))


@pytest.mark.parametrize("cache_mb", [0, 100])
def test_every_picture_is_in_the_set_of_the_nearest_ratio_and_comes_in_its_size(photos, cache_mb):
    config = _config(photos)
    sets = picture_set.open_sets(photos, buckets=config.buckets, cache_mb=cache_mb)
    assert [each.size for each in sets] == [SIZES["wide"], SIZES["square"], SIZES["tall"]]
    for kind, each in zip(("wide", "square", "tall"), sets, strict=True):
        assert {record.key for record in each.records} == {f"{kind}{number}" for number in range(COUNTS[kind])}
        for number, record in enumerate(each.records):
            red = 5 * int(record.key.removeprefix(kind))
            np.testing.assert_array_equal(each.rgba(number), np.broadcast_to((red, 9, 200, 255), (*SIZES[kind], 4)))


def test_a_ratio_without_pictures_has_no_set_and_a_picture_that_cannot_be_read_is_skipped(photos, tmp_path):
    broken = Record("broken", b"\x89PNG\r\n\x1a\n broken", captions=("broken",))
    records.write_dataset(tmp_path / "set", [_photo("tall", 0), broken, _photo("tall", 1)], {})
    sets = picture_set.open_sets(tmp_path / "set", buckets=_config(photos).buckets)
    assert [(each.size, len(each), len(each.skipped)) for each in sets] == [(SIZES["tall"], 2, 1)]


def test_a_batch_is_of_one_size_and_all_pictures_are_seen_as_often(photos):
    batches = make_loader(_config(photos), seed=3)
    seen, sizes = collections.Counter(), []
    for batch in itertools.islice(batches, 4 * sum(COUNTS.values())):
        kind = batch["captions"][0]
        assert set(batch["captions"]) == {kind} and batch["size"] == SIZES[kind]
        assert batch["images"].shape == (4, *SIZES[kind], 3)
        own = next(each for each in batches.pictures if each.size == batch["size"])
        for key, index, image in zip(batch["keys"], batch["indices"], batch["images"], strict=True):
            assert own.records[index].key == key
            assert image[0, 0, 0] == 5 * int(key.removeprefix(kind))
        seen.update(batch["keys"])
        sizes.append(batch["size"])
    assert set(seen.values()) <= {15, 16, 17} and len(seen) == sum(COUNTS.values())
    assert set(sizes[:16]) == set(SIZES.values()), "sizes alternate"


def test_a_size_with_few_pictures_has_its_turn_no_sooner_than_others_and_is_told_of(tmp_path, caplog):
    photos = [_photo("tall", 0), *(_photo("square", number) for number in range(47))]
    records.write_dataset(tmp_path / "set", photos, {})
    first = set()
    for seed in range(8):
        batches = make_loader(_config(str(tmp_path / "set"), batch_size=8), seed=seed)
        turns = [next(batches)["size"] == SIZES["tall"] for _ in range(96)]
        assert sum(turns) == 2
        first.add(turns.index(True))
    assert len(first) > 3 and max(first) > 20
    assert "batches of 8 repeat their pictures where there are only 1 of 20x12; fewer" in caplog.text


def test_which_picture_has_which_size_is_in_the_digest_of_a_set(photos):
    def digest(*ratios, size=64):
        return picture_set.digest(picture_set.open_sets(photos, buckets=buckets_of(ratios, size), cache_mb=0))

    assert len({digest(1.0), digest(0.6), digest(0.6, 1.0), digest(0.6, 1.67), digest(0.26, 0.94)}) == 5
    assert digest(1.0) == digest(1.0, size=32)


def test_batches_of_several_sizes_are_a_function_of_seed_and_step_for_any_processes(photos):
    whole = [batch for batch, _ in zip(make_loader(_config(photos), seed=1), range(12))]
    parts = [make_loader(_config(photos, threads=3), seed=1, start_step=5, positions=own) for own in ([0, 1], [2, 3])]
    for batch in whole[5:]:
        one, other = (next(part) for part in parts)
        assert batch["size"] == one["size"] == other["size"]
        assert batch["keys"] == one["keys"] + other["keys"]
        np.testing.assert_array_equal(batch["images"], np.concatenate([one["images"], other["images"]]))
    another = [batch for batch, _ in zip(make_loader(_config(photos), seed=2), range(12))]
    assert [batch["keys"] for batch in whole] != [batch["keys"] for batch in another]


def test_latents_of_each_size_are_kept_apart(photos, tmp_path):
    config = _config(photos)
    caches = {}
    for each in picture_set.open_sets(photos, buckets=config.buckets):
        caches[each.size] = latent_cache.open_latent_cache(
            tmp_path, each, config.backgrounds, lambda images: images[:, ::4, ::4].astype(np.float32), "weights", 8
        )
    assert len({cache.folder for cache in caches.values()}) == 3
    for batch in itertools.islice(make_loader(config, seed=0), 8):
        got = caches[batch["size"]](batch["indices"], batch["backgrounds"])
        np.testing.assert_array_equal(got, batch["images"][:, ::4, ::4])
