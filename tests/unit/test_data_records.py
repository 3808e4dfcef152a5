"""Records and shards: what is written is read, and what is broken is noticed."""

import os

import pytest

from sana_jax.data import records
from sana_jax.data.records import CorruptRecord, Emoji, Record

PHOTO = Record("holidays/beach.jpg", b"\xff\xd8picture", captions=("a beach", "sand, sea"))
DRAWING = Record(
    "1f34e/noto", b"RIFFpicture", emoji=Emoji("noto", "1f34e", "red apple", ("fruit", "piñata"), "food-drink")
)


@pytest.mark.parametrize("record", [PHOTO, DRAWING])
def test_a_record_is_read_as_it_was_written(record):
    assert records.decode(records.encode(record)) == record


def test_any_changed_byte_is_noticed():
    data = records.encode(DRAWING)
    for place in range(len(data)):
        broken = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        with pytest.raises(CorruptRecord):
            records.decode(broken)


def test_a_record_cut_short_is_noticed():
    data = records.encode(PHOTO)
    for length in range(len(data)):
        with pytest.raises(CorruptRecord):
            records.decode(data[:length])


def test_a_set_is_read_in_the_order_it_was_written(tmp_path):
    index = records.write_dataset(tmp_path / "set", [DRAWING, PHOTO], {"kind": "test"})
    assert index == records.read_index(tmp_path / "set")
    assert index["kind"] == "test" and index["shards"][0]["records"] == 2
    assert [record for _, record in records.read_dataset(tmp_path / "set")] == [DRAWING, PHOTO]


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path):
    def failing():
        yield PHOTO
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        records.write_dataset(tmp_path / "set", failing(), {})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_overwriting_leaves_the_old_set(tmp_path):
    records.write_dataset(tmp_path / "set", [PHOTO], {})
    with pytest.raises(ValueError, match="no record to write"):
        records.write_dataset(tmp_path / "set", [], {}, overwrite=True)
    assert [record for _, record in records.read_dataset(tmp_path / "set")] == [PHOTO]
    records.write_dataset(tmp_path / "set", [DRAWING], {}, overwrite=True)
    assert [record for _, record in records.read_dataset(tmp_path / "set")] == [DRAWING]


def test_files_that_are_there_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder; remove it, or pass --overwrite"):
        records.write_dataset(tmp_path, [PHOTO], {})
    with pytest.raises(ValueError, match="is no data set .* and is not deleted; remove it yourself"):
        records.write_dataset(tmp_path, [PHOTO], {}, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_folder_with_another_dataset_json_is_no_set_and_stays(tmp_path):
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(ValueError, match="is not of a data set: it names no shards"):
        records.read_index(tmp_path)
    with pytest.raises(ValueError, match="--overwrite: .* is no data set .* and is not deleted"):
        records.write_dataset(tmp_path, [PHOTO], {}, overwrite=True)
    assert (tmp_path / "dataset.json").exists()


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} is a mount point, .* give one inside it, as {tmp_path}/set"):
        records.write_dataset(tmp_path, iter(lambda: 1 / 0, None), {})


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(tmp_path, monkeypatch):
    writer = records.array_record_module.ArrayRecordWriter
    monkeypatch.setattr(
        records.array_record_module, "ArrayRecordWriter", lambda file, options: writer("/dev/full", options)
    )
    with pytest.raises(OSError, match="pictures-00000.array_record of the set cannot be written: .*No space left"):
        records.write_dataset(tmp_path / "set", [PHOTO] * 1000, {})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_set_is_an_error_that_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a data set: it has no dataset.json. Make one with `python -m"):
        records.read_index(tmp_path)


def test_a_missing_and_a_truncated_shard_each_give_one_error_in_their_place(tmp_path):
    records.write_dataset(tmp_path / "set", [PHOTO, DRAWING], {})
    shard = tmp_path / "set" / "pictures-00000.array_record"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 3])
    ((place, error),) = records.read_dataset(tmp_path / "set")
    assert isinstance(error, Exception) and str(place) == str(shard)
    shard.unlink()
    ((place, error),) = records.read_dataset(tmp_path / "set")
    assert isinstance(error, FileNotFoundError)


def test_a_damaged_shard_gives_up_no_changed_record(tmp_path):
    wanted = [Record(f"{i}.png", bytes([i]) * 500, captions=("x",)) for i in range(20)]
    records.write_dataset(tmp_path / "set", wanted, {})
    shard = tmp_path / "set" / "pictures-00000.array_record"
    data = bytearray(shard.read_bytes())
    at = bytes(data).index(bytes([7]) * 500)
    data[at + 100] ^= 0xFF
    shard.write_bytes(data)
    got = [record for _, record in records.read_dataset(tmp_path / "set")]
    good = [record for record in got if isinstance(record, Record)]
    assert len(got) == 20 and len(good) == 19
    assert good == [record for record in wanted if record.key != "7.png"]
