"""The emoji set's rules, and that the set in the repository follows them."""

import collections
import hashlib
import itertools
import re

import numpy as np
import pytest

from sana_jax.data import picture_set, records
from sana_jax.data.emoji import BACKGROUNDS, STYLES, is_held_out, normalise_codepoints


@pytest.mark.parametrize(
    ("codepoints", "style", "held_out"),
    [  # by hand: printf '1f468-200d-1f373/noto' | sha256sum -> 0c98...
        ("1f468-200d-1f373", "noto", True),  # 0c98
        ("1f34e", "noto", False),  # 45e9
        ("1f34e", "twemoji", False),  # 2d1e
        ("1f34e", "fluent-3d", False),  # e698
        ("2615", "noto", False),  # de46
    ],
)
def test_held_out_rule_on_digests_computed_by_hand(codepoints, style, held_out):
    assert is_held_out(codepoints, style) == held_out


def test_variation_selectors_and_capitals_do_not_change_the_rule():
    assert normalise_codepoints("2764-FE0F-200D-1F525") == "2764-200d-1f525"
    assert normalise_codepoints("00A9-FE0E") == "a9"
    for style in STYLES:
        assert is_held_out("2764-FE0F-200D-1F525", style) == is_held_out("2764-200d-1f525", style)


def test_fluent_flat_follows_fluent_3d_and_fxemoji_holds_nothing_out():
    points = [f"{point:x}" for point in range(0x1F300, 0x1F600)]
    assert [is_held_out(p, "fluent-flat") for p in points] == [is_held_out(p, "fluent-3d") for p in points]
    assert any(is_held_out(p, "fluent-flat") for p in points)
    assert not any(is_held_out(p, "fxemoji") for p in points)


def test_backgrounds_are_far_apart():
    colours = np.array(list(BACKGROUNDS.values()), float)
    closest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2))
    assert closest >= 95


@pytest.fixture(scope="module")
def embedded():
    return [record for _, record in records.read_dataset(picture_set.embedded_path())]


def test_embedded_set_reads_whole_and_its_contents_table_agrees(embedded):
    index = records.read_index(picture_set.embedded_path())
    assert index["shards"][0]["records"] == len(embedded)
    pictures = collections.Counter(record.emoji.style for record in embedded)
    held_out = collections.Counter(r.emoji.style for r in embedded if is_held_out(r.emoji.codepoints, r.emoji.style))
    assert index["counts"] == {s: {"pictures": pictures[s], "held_out": held_out[s]} for s in STYLES}
    styles = collections.defaultdict(list)
    for record in embedded:
        entry = index["concepts"][record.emoji.codepoints]
        assert (entry["label"], entry["tags"], entry["group"]) == (
            record.emoji.label,
            " | ".join(record.emoji.tags),
            record.emoji.group,
        )
        styles[record.emoji.codepoints].append(record.emoji.style)
    assert {points: " ".join(names) for points, names in styles.items()} == {
        points: entry["styles"] for points, entry in index["concepts"].items()
    }


def test_embedded_train_split_is_the_complement_of_an_independent_statement_of_the_rule(embedded):
    def out(points, style):
        digest = hashlib.sha256((points + "/" + style).encode("ascii")).digest()
        return digest[0] < 16 and style in {"noto", "twemoji", "fluent-3d"}  # first hexadecimal digit 0

    pairs = [(record.emoji.codepoints, record.emoji.style) for record in embedded]
    kept_out = {(p, s) for p, s in pairs if out(p, s) or (s == "fluent-flat" and out(p, "fluent-3d"))}
    assert 350 < len(kept_out) < 420  # 1/16 of 6,157
    splits = {
        split: {r.key for r in picture_set.open_set(split=split, image_size=8, cache_mb=0).records}
        for split in ("train", "heldout")
    }
    assert splits["heldout"] == {f"{p}/{s}" for p, s in kept_out}
    assert splits["train"] == {f"{p}/{s}" for p, s in pairs} - splits["heldout"]


def test_embedded_set_has_no_flag_keycap_letter_button_clock_face_or_skin_tone(embedded):
    for record in embedded:
        label, points = record.emoji.label, [int(p, 16) for p in record.emoji.codepoints.split("-")]
        assert record.emoji.group not in ("flags", "component", "")
        assert not re.search(
            r"keycap|o’clock|thirty|blood type|Japanese “|\b(CL|COOL|FREE|ID|NEW|NG|UP!|VS) button", label
        )
        assert not any(
            0x1F3FB <= p <= 0x1F3FF or 0x1F1E6 <= p <= 0x1F1FF or p in (0x20E3, 0xFE0E, 0xFE0F) for p in points
        )


def test_held_out_concepts_are_trained_on_in_another_style(embedded):
    trained = {
        record.emoji.codepoints for record in embedded if not is_held_out(record.emoji.codepoints, record.emoji.style)
    }
    held_out = {r.emoji.codepoints for r in embedded if is_held_out(r.emoji.codepoints, r.emoji.style)}
    assert held_out <= trained


def test_embedded_set_names_its_sources_with_versions_digests_and_licences():
    index = records.read_index(picture_set.embedded_path())
    assert {package["style"]: package["licence"] for package in index["packages"]} == {
        None: "MIT",
        "noto": "Apache-2.0",
        "fluent-3d": "MIT",
        "fluent-flat": "MIT",
        "fxemoji": "Apache-2.0",
        "twemoji": "CC-BY-4.0",
    }
    assert all(re.fullmatch("[0-9a-f]{64}", package["sha256"]) for package in index["packages"])
    assert all(package["version"] and package["attribution"] for package in index["packages"])
