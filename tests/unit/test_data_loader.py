"""The loader: determinism, resume, processes, held-out pairs, broken pictures."""

import contextlib
import gc
import io
import logging
import os
import pathlib
import threading

import numpy as np
import pytest
from PIL import Image

from sana_jax.data import catalog, loader, picture_set, records, transforms
from sana_jax.data.emoji import BACKGROUNDS, STYLES, is_held_out
from sana_jax.data.loader import LoaderConfig, make_loader
from sana_jax.data.records import Emoji, Record

SIZE = 8


def _webp(colour, shape=(12, 12), alpha=True):
    array = np.zeros((*shape, 4), np.uint8)
    array[3:-3, 3:-3] = (*colour, 255)
    if not alpha:
        array[..., 3] = 255
    out = io.BytesIO()
    Image.fromarray(array).save(out, "WEBP", lossless=True)
    return out.getvalue()


def _drawing(point, style):
    emoji = Emoji(style, f"{point:x}", f"thing {point:x}", ("some", "tag"), "objects")
    return Record(f"{point:x}/{style}", _webp((point % 256, 100, 50)), emoji=emoji)


DRAWINGS = [_drawing(point, style) for point in range(0x1F400, 0x1F418) for style in STYLES]


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "drawings"
    records.write_dataset(path, DRAWINGS, {})
    return str(path)


def _config(path, **fields):
    return LoaderConfig(**{"path": path, "image_size": SIZE, "batch_size": 12, **fields})


def _take(batches, count):
    return [next(batches) for _ in range(count)]


def _assert_equal(one, other):
    assert one.keys() == other.keys()
    for field in one:
        np.testing.assert_array_equal(one[field], other[field])


def test_a_batch_has_pictures_and_a_caption_for_each(drawings):
    batch = next(make_loader(_config(drawings), seed=0))
    assert batch["images"].shape == (12, SIZE, SIZE, 3) and batch["images"].dtype == np.uint8
    assert len(batch["captions"]) == len(batch["keys"]) == len(batch["backgrounds"]) == len(batch["indices"]) == 12


def test_keys_and_indices_name_the_record_that_was_drawn(drawings):
    batches = make_loader(_config(drawings), seed=0)
    batch = next(batches)
    for key, index, caption in zip(batch["keys"], batch["indices"], batch["captions"], strict=True):
        assert batches.pictures[0].records[index].key == key
        assert f"thing {key.split('/')[0]}" in caption


def test_the_background_drawn_is_the_background_named(drawings):
    for batch in _take(make_loader(_config(drawings), seed=3), 5):
        for image, name, caption in zip(batch["images"], batch["backgrounds"], batch["captions"], strict=True):
            np.testing.assert_array_equal(image[0, 0], BACKGROUNDS[name])
            assert f"{name} background" in caption or (name == "white" and "background" not in caption)


def test_backgrounds_can_be_restricted(drawings):
    batch = next(make_loader(_config(drawings, backgrounds=("blue", "pink")), seed=0))
    assert set(batch["backgrounds"]) == {"blue", "pink"}


def test_held_out_pairs_are_absent_from_everything_the_train_loader_yields(drawings):
    expected = {r.key for r in DRAWINGS if not is_held_out(r.emoji.codepoints, r.emoji.style)}
    assert 0 < len(expected) < len(DRAWINGS)
    batches = make_loader(_config(drawings), seed=0)
    seen = {key for batch in _take(batches, 3 * len(DRAWINGS) // 12) for key in batch["keys"]}
    assert seen == expected


def test_the_held_out_split_yields_only_held_out_pairs(drawings):
    batches = make_loader(_config(drawings, split="heldout", batch_size=3), seed=0)
    seen = {key for batch in _take(batches, 20) for key in batch["keys"]}
    assert seen == {r.key for r in DRAWINGS if is_held_out(r.emoji.codepoints, r.emoji.style)}


def test_no_held_out_pair_is_in_a_whole_epoch_of_the_embedded_set(monkeypatch):
    monkeypatch.setattr(transforms, "decode", lambda picture: Image.new("RGBA", (4, 4)))
    batches = make_loader(LoaderConfig(image_size=4, batch_size=512), seed=0)
    epoch = -(-len(batches.pictures[0]) // 512)
    seen = {key for batch in _take(batches, epoch) for key in batch["keys"]}
    assert len(seen) == len(batches.pictures[0]) > 6000
    assert not [key for key in seen if is_held_out(*key.split("/"))]


@pytest.mark.parametrize("table_below", [0, loader.TABLE_BELOW])
def test_every_epoch_is_a_new_order_of_the_whole_set(drawings, table_below, monkeypatch):
    monkeypatch.setattr(loader, "TABLE_BELOW", table_below)
    batches = make_loader(_config(drawings, split="all", batch_size=len(DRAWINGS)), seed=0)
    first, second = (batch["keys"] for batch in _take(batches, 2))
    assert sorted(first) == sorted(second) == sorted(r.key for r in DRAWINGS)
    assert first != second


@pytest.mark.parametrize("start", [0, 1, 7, 9, 10, 31, 1000])
def test_starting_at_a_step_continues_as_if_never_stopped(drawings, start):
    config = _config(drawings)  # an epoch is 9 to 10 batches
    whole = make_loader(config, seed=5, start_step=max(start - 3, 0))
    _take(whole, min(start, 3))
    resumed = make_loader(config, seed=5, start_step=start)
    assert whole.step == resumed.step == start
    for one, other in zip(_take(whole, 4), _take(resumed, 4), strict=True):
        _assert_equal(one, other)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_parts_of_all_processes_make_the_batch_of_one(drawings, processes):
    config = _config(drawings)
    alone = _take(make_loader(config, seed=1), 3)
    positions = np.split(np.arange(config.batch_size), processes)
    parts = [_take(make_loader(config, seed=1, positions=own), 3) for own in positions]
    for step in range(3):
        for field in alone[0]:
            if alone[0][field] is None:
                continue
            if field == "size":
                assert all(part[step][field] == alone[step][field] == (SIZE, SIZE) for part in parts)
                continue
            joined = np.concatenate([np.asarray(part[step][field]) for part in parts])
            np.testing.assert_array_equal(joined, np.asarray(alone[step][field]))


def test_threads_prefetch_and_cache_do_not_change_what_is_yielded(drawings):
    plain = _take(make_loader(_config(drawings, threads=1, prefetch=1), seed=2), 12)
    for fields in ({"threads": 5, "prefetch": 8}, {"threads": 16}, {"cache_mb": 0, "threads": 2}):
        for one, other in zip(plain, _take(make_loader(_config(drawings, **fields), seed=2), 12), strict=True):
            _assert_equal(one, other)


def test_all_threads_work_on_one_batch(drawings, monkeypatch):
    batches = make_loader(_config(drawings, batch_size=4, threads=4, cache_mb=0), seed=0)
    together, decode = threading.Barrier(4), transforms.decode

    def decode_together(picture):
        together.wait(timeout=20)
        return decode(picture)

    monkeypatch.setattr(transforms, "decode", decode_together)
    assert next(batches)["images"].shape[0] == 4
    batches.close()


def test_a_process_looks_up_its_own_pictures_of_the_batches_that_it_prepares_and_no_others(drawings, monkeypatch):
    order, looked_up = list(range(40)) * 100, []

    class Order:
        def __getitem__(self, position):
            looked_up.append(position)
            return order[position]

    monkeypatch.setattr(loader, "_shuffled", lambda count, seed: Order())
    batches = make_loader(_config(drawings, prefetch=2), seed=0, start_step=5, positions=[1, 7])
    _take(batches, 2)
    assert looked_up == [12 * step + place for step in (5, 6, 7, 8) for place in (1, 7)]


def _loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_no_thread_outlives_its_loader(drawings):
    gc.collect()
    before = set(_loader_threads())
    closed, dropped = (make_loader(_config(drawings, threads=3, cache_mb=0), seed=0) for _ in range(2))
    _take(closed, 2), _take(dropped, 2)
    assert len(set(_loader_threads()) - before) == 6
    closed.close()
    rest = set(_loader_threads()) - before
    assert len(rest) == 3
    del dropped
    for thread in rest:
        thread.join(timeout=20)
    assert not set(_loader_threads()) - before


def test_a_picture_that_can_no_longer_be_read_ends_the_batches(drawings, monkeypatch):
    batches = make_loader(_config(drawings, threads=3, cache_mb=0), seed=0)

    def broken(picture):
        raise OSError("gone")

    monkeypatch.setattr(transforms, "decode", broken)
    for _ in range(2):
        with pytest.raises(ValueError, match="can no longer be read: gone"):
            next(batches)
    assert batches.step == 0


def test_pictures_of_a_set_that_was_replaced_meanwhile_are_not_taken_for_those_it_had(tmp_path):
    def write(colour):
        pictures = [Record(f"{i}.webp", _webp((colour, i, 9)), captions=("x",)) for i in range(4)]
        records.write_dataset(tmp_path / "set", pictures, {}, overwrite=True)

    write(9)
    batches = make_loader(_config(str(tmp_path / "set"), batch_size=4, cache_mb=0), seed=0)
    write(99)
    with pytest.raises(
        ValueError, match="can no longer be read: another picture stands there by now; the set was replaced"
    ):
        for _ in range(3):
            next(batches)


def test_another_seed_gives_another_order_and_other_captions(drawings):
    one, other = (next(make_loader(_config(drawings), seed=seed)) for seed in (0, 1))
    assert one["keys"] != other["keys"] and one["captions"] != other["captions"]


def test_shift_moves_drawings_by_at_most_the_configured_pixels(drawings):
    config = {"backgrounds": ("blue",), "batch_size": 60}
    still = next(make_loader(_config(drawings, **config), seed=0))
    moved = next(make_loader(_config(drawings, max_shift=2, **config), seed=0))
    assert still["keys"] == moved["keys"] and still["captions"] == moved["captions"]
    offsets = set()
    for a, b in zip(still["images"], moved["images"], strict=True):
        centre = [np.argwhere(np.abs(np.int32(x) - BACKGROUNDS["blue"]).max(-1) > 25).mean(0) for x in (a, b)]
        offsets.add(tuple(np.rint(centre[1] - centre[0]).astype(int).tolist()))
    assert len(offsets) > 10 and all(abs(y) <= 2 and abs(x) <= 2 for y, x in offsets)


@pytest.fixture
def partly_broken(tmp_path):
    good = [Record(f"good{i}.webp", _webp((9, 9, 9)), captions=("a square",)) for i in range(5)]
    bad = [Record("cut.webp", _webp((9, 9, 9))[:40], captions=("x",)), Record("text.webp", b"hello", captions=("x",))]
    records.write_dataset(tmp_path / "set", [good[0], bad[0], *good[1:], bad[1]], {})
    return str(tmp_path / "set")


def test_unreadable_pictures_are_counted_listed_and_skipped(partly_broken, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        batches = make_loader(_config(partly_broken, batch_size=5), seed=0)
    assert "skipped 2 of 7 pictures" in caplog.text and "cut.webp" in caplog.text and "text.webp" in caplog.text
    assert len(batches.pictures[0].skipped) == 2
    assert sorted(next(batches)["keys"]) == [f"good{i}.webp" for i in range(5)]


def close_shard(folder):
    """What a file server does that goes away: the open file can no longer be read."""
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith(folder):
                os.close(int(number))


def test_a_file_system_that_fails_is_asked_again_and_is_not_taken_for_a_broken_picture(drawings, monkeypatch, caplog):
    waits = []
    monkeypatch.setattr(picture_set.time, "sleep", waits.append)
    config = _config(drawings, cache_mb=0, prefetch=1)
    wanted, batches = _take(make_loader(config, seed=0), 9), make_loader(config, seed=0)
    _assert_equal(next(batches), wanted[0])
    close_shard(drawings)
    for batch in wanted[1:]:
        _assert_equal(next(batches), batch)
    batches.close()  # its threads read ahead
    assert set(waits) == {1}  # of each thread that read the shard before another had opened it again
    assert "cannot be read (pread() failed: Bad file descriptor" in caplog.text
    waits.clear()

    def gone(reader, number):
        raise records.FileSystemError("pread() failed: Stale file handle")

    with monkeypatch.context() as patch, pytest.raises(records.FileSystemError, match="Stale"):
        patch.setattr(records, "read_one", gone)
        batches.pictures[0].rgba(0)
    assert waits == [1, 5, 25]
    with monkeypatch.context() as patch, pytest.raises(records.FileSystemError, match="Stale"):
        patch.setattr(records, "read_one", gone)
        catalog.read_shard(pathlib.Path(drawings), 0, sized=False)

    def closed(path):
        raise RuntimeError("open() failed: Input/output error")

    with monkeypatch.context() as patch, pytest.raises(records.FileSystemError, match="00000.*Input/output error"):
        patch.setattr(records, "open_shard", closed)
        catalog.read_shard(pathlib.Path(drawings), 0, sized=False)


def test_a_set_of_unreadable_pictures_is_an_error_with_path_and_counts(tmp_path):
    records.write_dataset(tmp_path / "bad", [Record("x.png", b"no picture", captions=("x",))] * 3, {})
    with pytest.raises(ValueError, match=r"bad has no usable picture for split='train': of 3 records 3 are unreadable"):
        make_loader(_config(str(tmp_path / "bad")), seed=0)


def test_a_split_without_pictures_is_an_error_with_counts(tmp_path):
    records.write_dataset(tmp_path / "photos", [Record("x.webp", _webp((1, 2, 3)), captions=("x",))], {})
    with pytest.raises(
        ValueError, match=r"split='heldout': of 1 records 0 are unreadable and 1 belong to another split"
    ):
        make_loader(_config(str(tmp_path / "photos"), split="heldout"), seed=0)


def test_a_path_that_is_no_set_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a data set"):
        make_loader(_config(str(tmp_path)), seed=0)


def test_photographs_of_any_shape_come_with_one_of_their_captions(tmp_path):
    photos = [
        Record("wide.webp", _webp((200, 0, 0), (10, 30), alpha=False), captions=("a wide one", "wide")),
        Record("cut-out.webp", _webp((0, 200, 0), (30, 10)), captions=("a cut-out",)),
    ]
    records.write_dataset(tmp_path / "photos", photos, {})
    batches = make_loader(_config(str(tmp_path / "photos"), batch_size=16), seed=0)
    drawn = {}
    for batch in _take(batches, 3):
        for key, caption, background in zip(batch["keys"], batch["captions"], batch["backgrounds"], strict=True):
            drawn.setdefault(key, set()).add((caption, background))
    assert drawn == {
        "wide.webp": {("a wide one", ""), ("wide", "")},
        "cut-out.webp": {("a cut-out", "white")},
    }


def test_a_process_may_prepare_any_positions(drawings):
    whole, part = (
        next(make_loader(_config(drawings), seed=1)),
        next(make_loader(_config(drawings), seed=1, positions=[1, 7, 8])),
    )
    assert part["captions"] == [whole["captions"][i] for i in (1, 7, 8)]
    np.testing.assert_array_equal(part["images"], whole["images"][[1, 7, 8]])


@pytest.mark.parametrize("positions", [[], [-1], [12]])
def test_positions_outside_a_batch_are_an_error(drawings, positions):
    with pytest.raises(ValueError, match="are not from 0 to batch_size-1=11"):
        make_loader(_config(drawings), seed=0, positions=positions)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "test"}, "unknown split 'test'; use one of train, heldout, all"),
        ({"image_size": 0}, "image_size=0 is less than 1"),
        ({"batch_size": 0}, "batch_size=0 is less than 1"),
        ({"cache_mb": -1}, "cache_mb=-1 is less than 0"),
        ({"backgrounds": ("mauve",)}, r"unknown backgrounds \['mauve'\]; the backgrounds are white"),
        ({"max_shift": 8}, "max_shift=8 is not from 0 to 7, less than"),
    ],
)
def test_a_wrong_field_is_an_error_that_says_what_is_right(drawings, fields, message):
    with pytest.raises(ValueError, match=message):
        make_loader(_config(drawings, **fields), seed=0)


def test_evaluation_items_are_the_held_out_pairs_as_the_loader_would_show_them(drawings):
    items = loader.evaluation_items("heldout", path=drawings, image_size=SIZE)
    assert [i.record.key for i in items] == [r.key for r in DRAWINGS if is_held_out(r.emoji.codepoints, r.emoji.style)]
    shown = next(make_loader(_config(drawings, split="heldout", batch_size=len(items), backgrounds=("red",)), seed=0))
    for item in items:
        np.testing.assert_array_equal(item.image("red"), shown["images"][shown["keys"].index(item.record.key)])
    emoji = items[0].record.emoji
    assert items[0].caption("red") == f"a {emoji.label}, {emoji.style.replace('-', ' ')} style, on a red background"


def test_the_embedded_set_is_the_default():
    assert LoaderConfig().path == "" and picture_set.embedded_path().name == "emoji"
