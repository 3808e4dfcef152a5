"""Captions of drawings: grammar, order, what may be left out."""

import numpy as np
import pytest

from sana_jax.data import emoji
from sana_jax.data.captions import CaptionConfig, compose, plain_name, random_caption, with_article


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("red apple", "a red apple"),
        ("grinning face", "a grinning face"),
        ("ear of corn", "an ear of corn"),
        ("hourglass done", "an hourglass done"),
        ("unicorn", "a unicorn"),
        ("euro banknote", "a euro banknote"),
        ("unamused face", "an unamused face"),
        ("OK hand", "an OK hand"),
        ("x-ray", "an x-ray"),
        ("T-Rex", "a T-Rex"),
        ("Christmas tree", "a Christmas tree"),
        ("octopus", "an octopus"),
        ("dress", "a dress"),
        ("nest with eggs", "a nest with eggs"),
        ("face with rolling eyes", "a face with rolling eyes"),
        ("person lifting weights", "a person lifting weights"),
        ("index pointing up", "an index pointing up"),
    ],
)
def test_singular_names_take_the_article_of_their_first_sound(label, expected):
    assert with_article(label) == expected


@pytest.mark.parametrize(
    "label",
    [
        "grapes",
        "admission tickets",
        "cooked rice",
        "bread",
        "Santa Claus",
        "Statue of Liberty",
        "Aries",
        "people hugging",
    ]
    + [
        "1st place medal",
        "two hearts",
        "thumbs up",
        "no bicycles",
        "locked with key",
        "scissors",
        "potable water",
        "dizzy",
    ],
)
def test_plural_uncountable_and_proper_names_take_no_article(label):
    assert with_article(label) == label


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("man: red hair", "man with red hair"),
        ("woman: bald", "bald woman"),
        ("person: beard", "person with a beard"),
        ("person running: facing right", "person running facing right"),
        ("kiss: woman, man", "kiss of woman and man"),
        ("family: man, woman, girl, boy", "family of man, woman, girl and boy"),
        ("woman’s hat", "woman's hat"),
        ("piñata", "pinata"),
        ("sushi", "sushi"),
    ],
)
def test_labels_with_colons_and_typographic_marks_become_plain_words(label, expected):
    assert plain_name(label) == expected


def test_the_plain_caption_reads_as_the_documentation_says():
    assert emoji.caption("noto", "red apple", "blue") == "a red apple, noto style, on a blue background"
    assert (
        emoji.caption("fluent-3d", "ant", "orange", ["insect", "tiny"])
        == "an ant, insect, tiny, fluent 3d style, on an orange background"
    )


def test_an_unknown_style_or_background_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown style 'oil'; the styles are noto, fluent-3d"):
        emoji.caption("oil", "red apple", "blue")
    with pytest.raises(ValueError, match="unknown background 'mauve'; the backgrounds are white, grey"):
        emoji.caption("noto", "red apple", "mauve")


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (0, "a fox, red, noto style, on a blue background"),
        (1, "a fox, red, on a blue background, noto style"),
        (2, "a fox on a blue background, red, noto style"),
        (3, "noto style, a fox, red, on a blue background"),
    ],
)
def test_every_order_has_all_parts(order, expected):
    assert compose("a fox", "noto", "blue", ["red"], order) == expected


def test_parts_left_out_leave_no_punctuation_behind():
    for order in range(4):
        assert compose("a fox", None, None, (), order) == "a fox"
        assert compose("a fox", "noto", None, (), order) in ("a fox, noto style", "noto style, a fox")
        assert compose("a fox", None, "blue", (), order) in (
            "a fox, on a blue background",
            "a fox on a blue background",
        )


def _draw(config, background="blue", count=2000, tags=("animal", "face", "fox", "wild")):
    rngs = (np.random.default_rng([7, i]) for i in range(count))
    return [random_caption(config, "fox", "fluent-3d", tags, background, rng) for rng in rngs]


def test_a_share_of_captions_carries_one_to_three_keywords_and_never_the_name_itself():
    drawn = _draw(CaptionConfig(keyword_share=0.5, plain_order_share=1.0, no_article_share=0.0, no_style_share=0.0))
    assert all(c.startswith("a fox, ") and c.endswith("fluent 3d style, on a blue background") for c in drawn)
    counts = [c.count(",") - 2 for c in drawn]
    shares = [counts.count(k) / len(drawn) for k in range(4)]
    np.testing.assert_allclose(shares, [0.5, 1 / 6, 1 / 6, 1 / 6], atol=0.04)
    assert not any(", fox," in c for c in drawn)


def test_a_coloured_background_is_always_named():
    assert all("on a blue background" in c for c in _draw(CaptionConfig(no_background_share=1.0)))


def test_only_a_white_background_goes_unnamed():
    drawn = _draw(CaptionConfig(no_background_share=0.3), background="white")
    assert abs(sum("background" not in c for c in drawn) / len(drawn) - 0.3) < 0.04


def test_styles_are_left_out_at_the_configured_share():
    drawn = _draw(CaptionConfig(no_style_share=0.1))
    assert abs(sum("style" not in c for c in drawn) / len(drawn) - 0.1) < 0.03


def test_captions_depend_on_the_generator_alone():
    assert _draw(CaptionConfig(), count=50) == _draw(CaptionConfig(), count=50)
    assert len(set(_draw(CaptionConfig(), count=50))) > 20


def test_a_share_that_is_no_probability_is_an_error():
    with pytest.raises(ValueError, match="keyword_share=1.5 is not a probability; use a number from 0 to 1"):
        CaptionConfig(keyword_share=1.5)
    with pytest.raises(ValueError, match="max_keywords=0 is less than 1; for none, use keyword_share=0"):
        CaptionConfig(max_keywords=0)
