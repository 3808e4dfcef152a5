"""Files and folders that are there whole or not at all."""

import os
import pathlib

import pytest

from sana_jax import atomic


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    atomic.write_file(file, b"old")

    def crash(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_file(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_a_file_is_prepared_by_its_folders_alone(tmp_path):
    file = tmp_path / "a" / ".." / "b" / "picture.png"
    for _ in range(2):
        atomic.prepare_file(file)
        assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "b"]


def test_a_place_that_cannot_be_written_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for name, error in (("file/x", NotADirectoryError), ("folder", IsADirectoryError), ("new/" + "n" * 250, OSError)):
        with pytest.raises(error):
            atomic.prepare_file(tmp_path / name)
        assert sorted(tmp_path.rglob("*")) == before, name
    with pytest.raises(OSError, match="/proc/nowhere"):
        atomic.prepare_file(pathlib.Path("/proc/nowhere/deep/x.png"))


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        with atomic.new_folder(tmp_path / "export") as folder:
            (folder / text).write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["new"]


def test_an_interrupted_writer_leaves_the_old_folder(tmp_path):
    with atomic.new_folder(tmp_path / "export") as folder:
        (folder / "old").touch()
    with pytest.raises(KeyboardInterrupt), atomic.new_folder(tmp_path / "export") as folder:
        (folder / "new").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["old"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    writer = atomic.new_folder(tmp_path / "export")
    (writer.__enter__() / "half").touch()  # and never ends
    with atomic.new_folder(tmp_path / "export") as folder:
        assert not list(folder.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
