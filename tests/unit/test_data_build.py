"""Building sets: the emoji set from small packages made here, and a folder of pictures."""

import hashlib
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from sana_jax.data import __main__ as command
from sana_jax.data import emoji_build, folder_build, picture_set, records, transforms
from sana_jax.data.emoji_build import Concept, Package

RED, BLUE = (255, 0, 0), (0, 0, 255)
MESSAGES = {
    "groups": [{"key": "food-drink", "order": 4}, {"key": "symbols", "order": 8}, {"key": "flags", "order": 9}]
    + [{"key": "component", "order": 2}, {"key": "travel-places", "order": 5}],
    "subgroups": [
        {"key": key, "order": i} for i, key in enumerate(["fruit", "keycap", "alphanum", "flag", "time", "tone"])
    ],
}


def _entry(hexcode, label, group, subgroup, order, **more):
    return {"hexcode": hexcode, "label": label, "group": group, "subgroup": subgroup, "order": order, **more}


NAMES = [
    {"label": "regional indicator A", "hexcode": "1F1E6"},
    _entry("1F34F", "green apple", 4, 0, 2, tags=["apple", "fruit"]),
    _entry("1F34E", "red apple", 4, 0, 1, tags=["apple", "red"], skins=[{"hexcode": "1F34E-1F3FB"}]),
    _entry("1F330-FE0F", "chestnut", 4, 0, 3),
    _entry("0031-FE0F-20E3", "keycap: 1", 8, 1, 4),
    _entry("1F192", "COOL button", 8, 2, 5),
    _entry("1F3C1", "chequered flag", 9, 3, 6),
    _entry("1F550", "one o’clock", 5, 4, 7),
    _entry("1F55C", "one-thirty", 5, 4, 8),
    _entry("23F0", "alarm clock", 5, 4, 9),
    _entry("1F3FB", "light skin tone", 2, 5, 10),
]


def _square(left, colour):
    return f'<path fill="rgb{colour}" d="M{left} 0h5v10h-5z"/>'


def _tarball(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _webp(colour, size):
    out = io.BytesIO()
    Image.new("RGBA", (size, size), (*colour, 255)).save(out, "WEBP", lossless=True)
    return out.getvalue()


@pytest.fixture
def packages(tmp_path):
    files = {
        "names": {"en/data.json": NAMES, "en/messages.json": MESSAGES},
        "noto": {
            "icons.json": {
                "icons": {"red-apple": {"body": _square(0, RED)}, "cool-button": {"body": _square(0, RED)}},
                "aliases": {"green-apple": {"parent": "red-apple", "hFlip": True}},
                "width": 10,
                "height": 10,
            },
            "chars.json": {"1f34e": "red-apple", "1f34f-fe0f": "green-apple", "1f192": "cool-button"},
        },
        "fxemoji": {
            "icons.json": {
                "icons": {"redapple": {"body": _square(0, BLUE)}, "unrelated": {"body": ""}},
                "width": 10,
                "height": 10,
            },
            "chars.json": {},
        },
        "fluent-3d": {"assets/1f34e.webp": _webp(RED, 256), "assets/1f330-fe0f.webp": _webp(BLUE, 256)},
    }
    forms = {"names": "names", "noto": "icons", "fxemoji": "named icons", "fluent-3d": "files"}
    made = []
    for name, content in files.items():
        package = Package(f"@test/{name}", "1.0.0", "", None if name == "names" else name, forms[name], "MIT", "nobody")
        _tarball(tmp_path / package.tarball, content)
        digest = hashlib.sha256((tmp_path / package.tarball).read_bytes()).hexdigest()
        made.append(Package(package.name, "1.0.0", digest, package.style, package.form, "MIT", "nobody"))
    return made


def test_flags_keycaps_letter_buttons_clock_faces_and_skin_tones_are_left_out():
    contents = {"en/data.json": json.dumps(NAMES).encode(), "en/messages.json": json.dumps(MESSAGES).encode()}
    assert emoji_build.read_concepts(contents) == [
        Concept("1f34e", "red apple", ("apple", "red"), "food-drink"),
        Concept("1f34f", "green apple", ("apple", "fruit"), "food-drink"),
        Concept("1f330", "chestnut", (), "food-drink"),
        Concept("23f0", "alarm clock", (), "travel-places"),
    ]


def test_artwork_without_codepoints_is_matched_by_label_then_by_unicode_name():
    concepts = [
        Concept("1f346", "eggplant", (), ""),
        Concept("1f52b", "water pistol", (), ""),
        Concept("1f98a", "fox", (), ""),
    ]
    names = ("aubergine", "pistol", "fox", "fo-x")
    icons = {"icons": {name: {"body": name} for name in names}, "width": 4, "height": 4}
    found = emoji_build.read_named_icons({"icons.json": json.dumps(icons).encode()}, concepts)
    assert {points: svg.split(">")[1].split("<")[0] for points, svg in found.items()} == {
        "1f346": "aubergine",
        "1f98a": "fo-x",
    }


def test_the_emoji_build_renders_matches_and_packs(packages, tmp_path):
    pytest.importorskip("resvg_py")
    index = emoji_build.build(tmp_path / "set", tmp_path, packages=packages)
    read = {record.key: record for _, record in records.read_dataset(tmp_path / "set")}
    assert list(read) == ["1f34e/noto", "1f34e/fxemoji", "1f34e/fluent-3d", "1f34f/noto", "1f330/fluent-3d"]
    assert index["counts"]["noto"]["pictures"] == 2 and index["counts"]["fluent-3d"]["pictures"] == 2
    assert index["concepts"]["1f34e"]["styles"] == "noto fxemoji fluent-3d"

    def halves(key):
        picture = transforms.resize_and_crop(transforms.decode(read[key].picture), (128, 128)).astype(int)
        assert picture.shape == (128, 128, 4)
        return picture[64, 16], picture[64, 112]

    left, right = halves("1f34e/noto")
    assert left[3] == 255 and np.abs(left[:3] - RED).max() < 12 and right[3] == 0
    left, right = halves("1f34f/noto")  # an alias that mirrors
    assert left[3] == 0 and right[3] == 255 and np.abs(right[:3] - RED).max() < 12
    left, right = halves("1f330/fluent-3d")
    assert np.abs(left[:3] - BLUE).max() < 12 and right[3] == 255


def test_the_same_packages_give_the_same_bytes(packages, tmp_path):
    pytest.importorskip("resvg_py")
    for name in ("one", "two"):
        emoji_build.build(tmp_path / name, tmp_path, packages=packages)
    for file in ("pictures-00000.array_record", "dataset.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_package_that_is_not_the_pinned_one_is_an_error(packages, tmp_path):
    with open(tmp_path / packages[1].tarball, "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"test-noto-1.0.0.tgz has SHA-256 \w+, the pinned @test/noto@1.0.0 has \w+"):
        emoji_build.build(tmp_path / "set", tmp_path, packages=packages)


def test_a_missing_package_is_an_error_that_says_how_to_get_it(packages, tmp_path):
    (tmp_path / packages[1].tarball).unlink()
    with pytest.raises(ValueError, match=r"test-noto-1.0.0.tgz is missing; get it with `npm pack @test/noto@1.0.0`"):
        emoji_build.build(tmp_path / "set", tmp_path, packages=packages)


def test_without_npm_the_build_says_what_to_do(packages, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="npm is not installed; install it, or pass --packages"):
        emoji_build.build(tmp_path / "set", packages=packages)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "deep/c.webp", "no-caption.png", "empty-caption.png"):
        Image.new("RGB", (20, 30), RED).save(folder / name, "JPEG" if name.endswith("JPG") else None)
    (folder / "a.txt").write_text("\ufeffa red picture\n\n  all red \n", encoding="utf-8")  # as some editors write it
    (folder / "b.txt").write_text("ein rötliches Bild", encoding="utf-8")
    (folder / "deep/c.txt").write_text("deep\n")
    (folder / "empty-caption.txt").write_text("\n")
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "broken.txt").write_text("broken")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:50])
    (folder / "cut.txt").write_text("cut")
    return folder


def test_a_folder_becomes_a_set_without_the_pictures_that_cannot_be_used(pictures, tmp_path):
    index = folder_build.build(pictures, tmp_path / "set")
    read = [record for _, record in records.read_dataset(tmp_path / "set")]
    assert {record.key: record.captions for record in read} == {
        "a.png": ("a red picture", "all red"),
        "b.JPG": ("ein rötliches Bild",),
        "deep/c.webp": ("deep",),
    }
    assert read[0].picture == (pictures / "a.png").read_bytes()
    assert [line.split(":")[0] for line in index["skipped"]] == [
        "broken.png",
        "cut.png",
        "empty-caption.png",
        "no-caption.png",
    ]
    assert records.read_index(tmp_path / "set")["skipped"] == index["skipped"]


def test_tar_files_give_the_pictures_of_a_folder(pictures, tmp_path):
    """As WebDataset has them: `deep` stays outside, and beside a picture lie files of other kinds."""
    (tmp_path / "tars").mkdir()
    names = sorted(file.name for file in pictures.iterdir() if file.is_file())
    with tarfile.open(tmp_path / "tars" / "00000.tar", "w") as tar:
        tar.add(pictures / "b.JPG", "./0.v2.jpg")
        for name in names:
            tar.add(pictures / name, f"./{name}")
            if name == "a.png":
                tar.add(pictures / "b.JPG", "./a.mask.png")
                tar.add(pictures / "broken.txt", "./a.json")
    content = (tmp_path / "tars" / "00000.tar").read_bytes()
    (tmp_path / "tars" / "00001.tar").write_bytes(content[: content.index((pictures / "b.txt").read_bytes()) + 3])
    (tmp_path / "tars" / "00002.tar").write_bytes(b"no archive")
    shutil.copytree(pictures / "deep", tmp_path / "tars" / "deep")
    index = folder_build.build(tmp_path / "tars", tmp_path / "set")
    read = {record.key: record for _, record in records.read_dataset(tmp_path / "set")}
    assert {key: record.captions for key, record in read.items()} == {
        "00000.tar/a.png": ("a red picture", "all red"),
        "00000.tar/b.JPG": ("ein rötliches Bild",),
        "00001.tar/a.png": ("a red picture", "all red"),
        "deep/c.webp": ("deep",),
    }
    assert read["00000.tar/a.png"].picture == (pictures / "a.png").read_bytes()
    assert [line.partition(":")[0] for line in index["skipped"]] == [
        "00000.tar/0.v2.jpg",
        "00000.tar/broken.png",
        "00000.tar/cut.png",
        "00000.tar/empty-caption.png",
        "00000.tar/no-caption.png",
        "00001.tar/0.v2.jpg",
        "00001.tar",
        "00002.tar",
    ]
    assert all("can be read no further" in line for line in index["skipped"][-2:])


def test_a_tar_file_that_ends_before_its_end_is_told(pictures, tmp_path):
    """tarfile itself takes a damaged header, and a missing one, for the end."""
    (source := tmp_path / "tars").mkdir()
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name in ("0.png", "1.png", "2.png"):
            tar.add(pictures / "a.png", name)
            tar.add(pictures / "a.txt", name.replace("png", "txt"))
    content = whole.getvalue()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        header = tar.getmember("2.png").offset
    for name, data in (
        ("whole.tar", content),
        ("damaged.tar", content[:header] + b"\xff" + content[header + 1 :]),
        ("cut.tar", content[:header]),
        ("within.tar", content[: header + 100]),
    ):
        (source / name).write_bytes(data)
    index = folder_build.build(source, tmp_path / "set")
    assert index["shards"][0]["records"] == 3 + 3 * 2
    told = "can be read no further: the header at byte"
    assert [line.split(": ", 1)[0] for line in index["skipped"] if told in line] == [
        "cut.tar",
        "damaged.tar",
        "within.tar",
    ]
    assert len(index["skipped"]) == 3


def test_a_large_set_becomes_several_files(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "SHARD_BYTES", 1)
    assert command.main(["build", "folder", "--input", str(pictures), "--output", str(tmp_path / "set")]) == 0
    assert "3 pictures" in capsys.readouterr().out
    assert [shard["records"] for shard in records.read_index(tmp_path / "set")["shards"]] == [1, 1, 1]
    assert len(picture_set.open_set(tmp_path / "set", image_size=8)) == 3


def test_the_build_says_how_many_pictures_it_held_out_and_warns_of_none(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8), RED).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").write_text("red")
    assert command.main(["build", "folder", f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'set'}"]) == 0
    said = capsys.readouterr()
    assert "  0 of them held out\n" in said.out and "--config.sample.split=train" in said.err


def test_a_share_of_a_folder_can_be_held_out_of_training(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(200):
        Image.new("RGB", (8, 8), RED).save(tmp_path / "in" / f"{number}.png")
        (tmp_path / "in" / f"{number}.txt").write_text("red")
    index = folder_build.build(tmp_path / "in", tmp_path / "set", heldout=0.1)
    splits = {
        split: {record.key for record in picture_set.open_set(tmp_path / "set", split=split, image_size=8).records}
        for split in ("train", "heldout", "all")
    }
    assert index["held_out"] == len(splits["heldout"])
    assert 10 <= len(splits["heldout"]) <= 30 and not splits["heldout"] & splits["train"]
    assert splits["heldout"] | splits["train"] == splits["all"] and len(splits["all"]) == 200
    with pytest.raises(ValueError, match="--heldout=1.0 is not a share from 0 to below 1"):
        folder_build.build(tmp_path / "in", tmp_path / "other", heldout=1.0)


def test_a_folder_without_pictures_or_without_usable_ones_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="--input .*nowhere is not a folder"):
        folder_build.build(tmp_path / "nowhere", tmp_path / "set")
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"in holds no picture \(\*.png, \*.jpg"):
        folder_build.build(tmp_path / "in", tmp_path / "set")
    (tmp_path / "in" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 1 pictures in .* can be used; the first: x.png: has no caption"):
        folder_build.build(tmp_path / "in", tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("output", [".", "..", "../.."])
def test_the_pictures_are_never_replaced_by_the_set(pictures, output):
    before = sorted(pictures.rglob("*"))
    with pytest.raises(ValueError, match=r"--output .* would replace the pictures of --input .*; give another folder"):
        folder_build.build(pictures, pictures / output, overwrite=True)
    assert sorted(pictures.rglob("*")) == before


def test_the_command_builds_and_reports(pictures, tmp_path, capsys):
    assert command.main(["build", "folder", "--input", str(pictures), "--output", str(tmp_path / "set")]) == 0
    out = capsys.readouterr().out
    assert (
        "3 pictures" in out
        and "4 skipped" in out
        and "no-caption.png: has no caption: no-caption.txt is missing" in out
    )


def test_the_command_ends_with_one_line_and_code_2_on_an_error(tmp_path, capsys):
    assert command.main(["build", "folder", "--input", str(tmp_path / "x"), "--output", str(tmp_path / "y")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --input") and error.count("\n") == 1
