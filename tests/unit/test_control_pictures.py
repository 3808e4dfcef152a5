"""Sets whose pictures have one that guides a ControlNet: building, batches, latents, what does not fit."""

import importlib.util
import io
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
import tiny_run
from PIL import Image

from sana_jax.data import __main__ as command
from sana_jax.data import folder_build, latent_cache, records
from sana_jax.data.loader import LoaderConfig, make_loader, open_pictures

SIDE = 16


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """Of two ratios; `guided_files` beside it has the files."""
    path = tmp_path_factory.mktemp("data") / "guided"
    tiny_run.write_photographs(path, [(SIDE, SIDE), (20, 40), (SIDE, SIDE), (40, 80), (SIDE, SIDE)], control=True)
    return path


def config(path, **fields):
    fields = {"path": str(path), "image_size": SIDE, "batch_size": 2, "aspect_ratios": (0.5, 1.0)} | fields
    return LoaderConfig(**fields)


def changed(guided, tmp_path, change):
    """The files, changed."""
    shutil.copytree(guided.with_name("guided_files"), tmp_path / "files")
    change(tmp_path / "files")
    return tmp_path / "files"


@pytest.mark.parametrize("cache_mb", [0, 100])
def test_each_picture_of_a_batch_comes_with_the_one_that_guides_it(guided, cache_mb):
    wanted = config(guided, cache_mb=cache_mb)
    loader = make_loader(wanted, seed=0, pictures=open_pictures(wanted, controlled=True))
    sizes = set()
    for _, batch in zip(range(8), loader, strict=False):
        sizes.add(batch["size"])
        np.testing.assert_allclose(batch["controls"].astype(int), 255 - batch["images"].astype(int), atol=2)
    assert len(sizes) == 2
    assert next(make_loader(wanted, seed=0))["controls"] is None
    without = make_loader(wanted, seed=0, images=False, pictures=open_pictures(wanted, controlled=True))
    assert next(without)["controls"] is None


def test_tar_files_give_the_set_of_a_folder(guided, tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "shard.tar", "w") as tar:
        for file in sorted(guided.with_name("guided_files").iterdir()):
            tar.add(file, file.name)
    folder_build.build(tmp_path / "tars", tmp_path / "set", control=True)
    for name in ("", records.CONTROL):
        of_folder, of_tar = (
            [(record.picture, record.captions) for _, record in records.read_dataset(path / name)]
            for path in (guided, tmp_path / "set")
        )
        assert of_folder == of_tar and len(of_tar) == 5


def test_latents_of_both_are_cached(guided, tmp_path):
    encode = lambda images: np.asarray(images, np.float32)[:, ::4, ::4] / 4
    pictures = open_pictures(config(guided, aspect_ratios=(1.0,)), controlled=True)[0]
    caches = [
        latent_cache.open_latent_cache(tmp_path, each, ("white",), encode, "w") for each in (pictures, pictures.control)
    ]
    images, controls = (cache(np.arange(5), [""] * 5) for cache in caches)
    np.testing.assert_allclose(controls, 255 / 4 - images, atol=1)
    assert caches[0].folder != caches[1].folder


def test_pictures_without_one_that_guides_or_of_another_shape_are_skipped(guided, tmp_path, capsys):
    def change(files):
        (files / "00.control.png").unlink()
        (files / "01.control.png").write_bytes((files / "00.png").read_bytes())
        (files / "02.control.png").write_bytes(b"no picture")

    files = changed(guided, tmp_path, change)
    assert command.main(["build", "folder", f"--input={files}", f"--output={tmp_path / 'set'}", "--control"]) == 0
    told = capsys.readouterr().out
    assert "00.png: has no picture that guides: 00.control.png is missing" in told
    assert "01.png: is 20x40 and the picture that guides it 16x16; they have to be of one shape" in told
    assert "02.png: " in told and "3 skipped" in told
    assert len(open_pictures(config(tmp_path / "set"), controlled=True)) == 2


def test_pictures_that_guide_are_no_pictures_of_a_set_without(guided, tmp_path):
    files = guided.with_name("guided_files")
    index = folder_build.build(files, tmp_path / "set")
    assert index["shards"][0]["records"] == 5 and not index["skipped"]
    with pytest.raises(FileNotFoundError, match="has no pictures that guide a ControlNet. Build it with .* --control"):
        open_pictures(config(tmp_path / "set"), controlled=True)


def test_pictures_that_guide_others_are_refused(guided, tmp_path):
    shutil.copytree(guided, tmp_path / "set")
    other = tmp_path / "other"
    tiny_run.write_photographs(other, [(SIDE, SIDE)] * 3, control=True)
    shutil.rmtree(tmp_path / "set" / "control")
    shutil.copytree(other / "control", tmp_path / "set" / "control")
    with pytest.raises(
        ValueError, match="does not hold the pictures that guide those of .*, record for record .3 for 5."
    ):
        open_pictures(config(tmp_path / "set"), controlled=True)


def test_held_out_pictures_have_theirs(guided, tmp_path):
    folder_build.build(guided.with_name("guided_files"), tmp_path / "set", control=True, heldout=0.5)
    for split in ("train", "heldout"):
        (found,) = open_pictures(config(tmp_path / "set", split=split, aspect_ratios=(1.0,)), controlled=True)
        keys = [[record.key for record in each.records] for each in (found, found.control)]
        assert keys[0] == keys[1] and 0 < len(keys[0]) < 5


def test_a_picture_and_the_one_that_guides_it_are_of_one_size_though_their_own_ratios_are_not_quite(tmp_path):
    """Rounded to pixels the smaller one's is nearer to another aspect ratio."""
    source = tmp_path / "files"
    source.mkdir()
    Image.new("RGB", (508, 451)).save(source / "x.png")
    Image.new("RGB", (128, 114)).save(source / "x.control.png")
    (source / "x.txt").write_text("x")
    folder_build.build(source, tmp_path / "set", control=True)
    boundary = config(tmp_path / "set", image_size=512, batch_size=1, aspect_ratios=(0.88, 0.94))
    assert 0.5 * (0.88 + 0.94) != 451 / 508
    batch = next(make_loader(boundary, seed=0, pictures=open_pictures(boundary, controlled=True)))
    assert batch["controls"].shape == batch["images"].shape


def test_several_that_guide_one_and_those_that_guide_none_are_told(guided, tmp_path, caplog):
    def change(files):
        shutil.copyfile(files / "00.control.png", files / "00.control.webp")
        shutil.copyfile(files / "00.control.png", files / "99.control.png")

    index = folder_build.build(changed(guided, tmp_path, change), tmp_path / "set", control=True)
    assert index["skipped"] == ["00.png: has 2 pictures that guide, 00.control.*; leave one"]
    assert "1 pictures guide none that is there" in caplog.text


def test_a_picture_that_guides_and_cannot_be_read_any_more_is_told(guided, tmp_path):
    shutil.copytree(guided, tmp_path / "set")
    shard = tmp_path / "set" / "control" / "pictures-00000.array_record"
    content = bytearray(shard.read_bytes())
    at = content.index(b"\x89PNG") + 40
    content[at] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"record for record .5 for 5.*Unreadable now:\n  .*pictures-00000"):
        open_pictures(config(tmp_path / "set"), controlled=True)


def test_an_upright_picture_is_told_by_its_orientation(guided, tmp_path):
    """A photograph that lies on its side in the file has the shape that it is shown with."""

    def change(files):
        lying = Image.open(files / "01.png").transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6
        out = io.BytesIO()
        lying.save(out, "JPEG", exif=exif)
        (files / "01.png").unlink()
        (files / "01.jpg").write_bytes(out.getvalue())

    files = changed(guided, tmp_path, change)
    assert not folder_build.build(files, tmp_path / "set", control=True)["skipped"]


def test_the_example_writes_what_the_build_reads_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    file = pathlib.Path(__file__).parents[2] / "examples" / "guided_emoji.py"
    example = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("guided_emoji", file))
    spec.loader.exec_module(example)
    all_items = example.evaluation_items
    monkeypatch.setattr(example, "evaluation_items", lambda split: all_items("heldout")[:3])
    assert example.main([f"--output={tmp_path / 'guided'}"]) == 0
    index = folder_build.build(tmp_path / "guided" / "train", tmp_path / "set", control=True)
    assert index["shards"][0]["records"] == 3 and not index["skipped"]
    drawn = np.asarray(Image.open(next((tmp_path / "guided" / "heldout").glob("*.control.png"))))
    assert drawn.shape == (64, 64) and drawn.max() == 255 and drawn.min() < 50, "lines on white"
    assert example.main([f"--output={tmp_path / 'guided'}"]) == 2
    assert "exists; give another folder" in capsys.readouterr().err
    monkeypatch.setattr(example, "evaluation_items", lambda split: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        example.main([f"--output={tmp_path / 'broken'}"])
    assert not (tmp_path / "broken").exists()
