"""What is known of a set without its pictures: read once, of any number of shards, kept, made again where it is damaged."""

import dataclasses
import io
import os
import resource
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from sana_jax.data import catalog, kept_catalog, picture_set, records
from sana_jax.data.emoji import is_held_out
from sana_jax.data.records import Emoji, Record

PHOTOS = [Record(f"{i}.webp", bytes([i]) * (50 + i), captions=(f"Bild {i}", "größer")) for i in range(20)]
DRAWINGS = [
    Record(f"{point}/noto", point.encode() * 9, emoji=Emoji("noto", point, "x")) for point in ("1f34e", "1f98a")
]
RECORDS = [*PHOTOS[:7], *DRAWINGS, *PHOTOS[7:]]
SIZES = [6, 5, 5, 5, 1]  # of the shards
BROKEN, MISSING, SHARE = 11, range(16, 21), 0.4


@pytest.fixture
def reads(monkeypatch):
    """Numbers of the shards that are read; every set is new to the process, and large."""
    asked, read_shard = [], records.read_shard
    monkeypatch.setattr(
        records, "read_shard", lambda path, shard, take: asked.append(shard) or read_shard(path, shard, take)
    )
    monkeypatch.setattr(records, "SHARD_BYTES", 600)
    monkeypatch.setattr(catalog, "_known", {})
    monkeypatch.setattr(kept_catalog, "KEPT_FROM", 0)
    return asked


@pytest.fixture
def path(reads, tmp_path):
    """Several shards, one of them with a record that is broken and another missing."""
    index = records.write_dataset(tmp_path / "set", RECORDS, {"heldout": SHARE})
    assert [shard["records"] for shard in index["shards"]] == SIZES
    shard = tmp_path / "set" / "pictures-00002.array_record"
    content = bytearray(shard.read_bytes())
    content[bytes(content).index(RECORDS[BROKEN].picture)] ^= 0xFF
    shard.write_bytes(content)
    (tmp_path / "set" / "pictures-00003.array_record").unlink()
    return tmp_path / "set"


def found(path):
    """What is known of each record."""
    known = catalog.open_catalog(path)
    return [
        (
            known.place(i),
            known.record(i) if row["readable"] else known.error(i),
            *row[["drawn", "held_out", "checksum"]].tolist(),
        )
        for i, row in enumerate(known.rows)
    ]


def test_all_records_are_found_in_order_with_what_is_wrong_with_some(path):
    shards = [path / f"pictures-{number:05d}.array_record" for number in range(5)]
    items = found(path)
    places = [(shard, number) for shard, size in zip(shards, SIZES, strict=True) for number in range(size)]
    places[MISSING.start : MISSING.stop] = [(shards[3], None)]
    assert [item[0] for item in items] == places
    assert "hash mismatch" in items[BROKEN][1] and "missing" in items[MISSING.start][1]
    readable = [(i, item) for i, item in enumerate(items) if isinstance(item[1], Record)]
    wanted = [*RECORDS[:BROKEN], *RECORDS[BROKEN + 1 : MISSING.start], *RECORDS[MISSING.stop :]]
    assert [item[1] for _, item in readable] == [dataclasses.replace(record, picture=b"") for record in wanted]
    for record, (_, (_, _, drawn, held_out, checksum)) in zip(wanted, readable, strict=True):
        assert drawn == (record.emoji is not None) and checksum == records.zlib.crc32(record.picture)
        assert held_out == (
            is_held_out(record.emoji.codepoints, "noto") if drawn else records.is_held_out(record.key, SHARE)
        )
    assert 0 < sum(item[3] for item in items) < len(items) - 2


def test_a_set_is_opened_by_split_and_read_once(path, reads):
    splits = {split: picture_set.open_set(path, split=split, image_size=8, cache_mb=0) for split in picture_set.SPLITS}
    keys = {split: [record.key for record in opened.records] for split, opened in splits.items()}
    assert sorted(keys["train"] + keys["heldout"]) == sorted(keys["all"]) and keys["train"] and keys["heldout"]
    assert all(len(opened.skipped) == 2 and len(opened) == len(opened.records) for opened in splits.values())
    assert len(reads) == 5
    assert picture_set.count_records(path, "heldout") == len(keys["heldout"]) and len(reads) == 5
    records.write_dataset(path, PHOTOS[:2], {}, overwrite=True)
    assert picture_set.count_records(path, "all") == 2 and len(reads) == 6


def test_what_was_found_in_a_large_set_is_kept_for_later_processes(path, reads, tmp_path):
    wanted, kept = found(path), tmp_path / "kept"
    kept_catalog.read_together(path, kept)
    assert found(path) == wanted and len(reads) == 10
    (folder,) = kept.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["headers.jsonl", "rows.npy"]
    catalog._known.clear()
    kept_catalog.read_together(path, kept)
    assert found(path) == wanted and len(reads) == 10
    assert isinstance(catalog.open_catalog(path).rows.base, np.memmap), "mapped, not read"


def test_a_set_keeps_its_catalog_wherever_it_is_seen(path, reads, tmp_path):
    kept = tmp_path / "kept"
    kept_catalog.read_together(path, kept)
    (elsewhere := tmp_path / "elsewhere").symlink_to(path)
    catalog._known.clear()
    kept_catalog.read_together(elsewhere, kept)
    assert len(reads) == 5 and len(list(kept.iterdir())) == 1


def test_many_shards_need_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD_BYTES", 1)
    monkeypatch.setattr(catalog, "_known", {})
    monkeypatch.setattr(kept_catalog, "KEPT_FROM", 0)
    monkeypatch.setattr(picture_set, "_OPEN_SHARDS", 10)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    count = 100
    records.write_dataset(
        tmp_path / "set", (Record(f"{i}.png", picture.getvalue(), captions=("x",)) for i in range(count)), {}
    )
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limits[1]))
    try:
        kept_catalog.read_together(tmp_path / "set", tmp_path / "kept")
        opened = picture_set.open_set(tmp_path / "set", image_size=8, cache_mb=0)
        assert [opened.rgba(number).shape for number in range(len(opened))] == [(8, 8, 4)] * count
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_small_set_is_not_kept(path, monkeypatch, tmp_path):
    monkeypatch.setattr(kept_catalog, "KEPT_FROM", 10**6)
    kept_catalog.read_together(path, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("name", ["rows.npy", "headers.jsonl"])
@pytest.mark.parametrize("length", [0, 50, -1])
def test_a_damaged_catalog_is_made_again(name, length, path, reads, tmp_path, caplog):
    wanted, kept = found(path), tmp_path / "kept"
    kept_catalog.read_together(path, kept)
    (file,) = kept.glob(f"*/{name}")
    content = file.read_bytes()
    file.write_bytes(content[:length])
    catalog._known.clear()
    kept_catalog.read_together(path, kept)
    assert found(path) == wanted and len(reads) == 15 and file.read_bytes() == content
    assert "rows.npy is damaged" in caplog.text and "is made again" in caplog.text


def test_a_line_that_is_no_json_is_an_error_that_says_what_to_do(path, tmp_path):
    kept_catalog.read_together(path, tmp_path / "kept")
    (file,) = tmp_path.glob("kept/*/headers.jsonl")
    content = bytearray(file.read_bytes())
    content[0] = 0
    file.write_bytes(content)
    catalog._known.clear()
    kept_catalog.read_together(path, tmp_path / "kept")
    with pytest.raises(ValueError, match=r"kept of .*00000.array_record\[0\] is damaged .* Remove data/ of WORKDIR"):
        found(path)


def test_reading_that_was_interrupted_goes_on(path, reads, tmp_path):
    calls = []

    def between():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_catalog.read_together(path, tmp_path / "kept", between)
    kept_catalog.read_together(path, tmp_path / "kept", between)
    assert len(reads) == 5 and len(calls) == 3 + 5
    assert found(path) and len(reads) == 5


def test_of_two_processes_that_put_a_catalog_together_the_slower_one_takes_the_others(path, tmp_path, monkeypatch):
    kept, join_rows = kept_catalog._Kept(path, tmp_path / "kept"), catalog.join_rows

    def overtaken(rows):
        monkeypatch.setattr(catalog, "join_rows", join_rows)
        kept_catalog._Kept(path, tmp_path / "kept").join()
        raise FileNotFoundError("a shard's own file")

    monkeypatch.setattr(catalog, "join_rows", overtaken)
    np.testing.assert_array_equal(kept.join().rows, kept.open().rows)


def test_a_set_is_read_without_holding_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "_known", {})
    noise, count, size = np.random.default_rng(0), 400, 100_000
    records.write_dataset(
        tmp_path / "set", (Record(f"{i}.webp", noise.bytes(size), captions=("x",)) for i in range(count)), {}
    )
    tracemalloc.start()
    opened = picture_set.open_set(tmp_path / "set", image_size=256, cache_mb=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(opened) == count and peak < count * size / 3
