"""Captions and their scores from the files beside pictures, and the draw by scores."""

import io
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from sana_jax.data import __main__ as command
from sana_jax.data import folder_build, records
from sana_jax.data.caption_files import JSON, SCORES, TEXT, gather
from sana_jax.data.captions import CaptionConfig, draw_caption
from sana_jax.data.loader import LoaderConfig, make_loader


def _png():
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 90, 200)).save(out, "PNG")
    return out.getvalue()


def test_scores_stand_a_line_beside_a_caption_a_line():
    found = gather("x", "x", {TEXT: b"a cat\n\na grey cat\r\n", SCORES: b"27.5\n31\n"})
    assert found == (("a cat", "a grey cat"), (27.5, 31.0), ())
    assert gather("x", "x", {TEXT: b"a\nb", SCORES: b"-3\n20"}).scores == (0.0, 20.0)


def test_captions_of_several_models_have_the_scores_of_their_names():
    beside = [
        ("_VILA-3B", {"x": {"VILA-3B": "a sleeping cat"}, "y": {"VILA-3B": "a dog"}}),
        ("_InternVL2", {"x": {"prompt": "a cat on a mat", "broken": None}}),
        ("_VILA-3B_clip_score", {"x": {"VILA-3B": "29.1", "unknown": 40}}),
        ("_prompt_clip_score", {"x": {"prompt": 20}}),
    ]
    found = gather("x", "x", {TEXT: b"cat\n"}, beside)
    assert found == (("cat", "a sleeping cat", "a cat on a mat"), (20.0, 29.1, None), ("unknown",))


def test_a_samples_own_json_gives_the_prompt_and_captions_that_have_scores():
    own = json.dumps({"prompt": "cat", "file_name": "cat.png", "height": 8, "VILA": " a grey cat "}).encode()
    assert gather("x", "x", {JSON: own}) == (("cat",), (), ())
    assert gather("x", "x", {JSON: own}, [("_clip_score", {"x": {"VILA": 30}})]) == (
        ("cat", "a grey cat"),
        (None, 30.0),
        (),
    )
    assert gather("x", "x", {TEXT: b"a text\n", JSON: b"no JSON, and not needed"}).texts == ("a text",)


@pytest.mark.parametrize(
    ("files", "beside", "message"),
    [
        ({}, [], "has no caption: x.txt is missing"),
        ({TEXT: b" \n"}, [], "has no caption: x.txt is empty"),
        ({TEXT: b"a\nb", SCORES: b"1"}, [], "x.scores.txt has 1 scores of 2 captions; write one a line"),
        ({TEXT: b"a", SCORES: b"inf"}, [], "x.scores.txt has the score 'inf'; a score is a number"),
        ({TEXT: b"a", SCORES: b"high"}, [], "the score 'high'"),
        (
            {TEXT: b"a"},
            [("_clip_score", {"x": {"prompt": "nan"}})],
            "the file _clip_score.json beside it has the score",
        ),
        ({JSON: b"[1]"}, [], "x.json has [1] where names with captions"),
        ({JSON: b"{"}, [], "x.json is no JSON"),
    ],
)
def test_files_of_another_form_are_told(files, beside, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gather("x", "x", files, beside)


@pytest.mark.parametrize("content", [{"x": "a cat"}, ["x"]])
def test_a_file_of_something_else_is_passed_over_and_said(content, caplog):
    assert gather("x", "x", {TEXT: b"a"}, [("_boxes", content)]).texts == ("a",)
    assert "x_boxes.json is passed over" in caplog.text


def _drawn(config, captions, scores, draws=4000):
    rng = np.random.default_rng(0)
    found = [draw_caption(config, captions, scores, rng) for _ in range(draws)]
    return {caption: found.count(caption) / draws for caption in captions}


def test_captions_are_drawn_with_the_power_of_their_scores_that_the_temperature_gives():
    shares = _drawn(CaptionConfig(temperature=0.1), ["a", "b", "c", "d"], [26.0, 30.0, 24.9, None])
    expected = 30**10 / (30**10 + 26**10)
    assert shares["c"] == shares["d"] == 0 and abs(shares["b"] - expected) < 0.02
    shares = _drawn(CaptionConfig(temperature=0.01), ["a", "b"], [29.0, 30.0])
    assert abs(shares["b"] - 30**100 / (30**100 + 29**100)) < 0.02
    shares = _drawn(CaptionConfig(temperature=float("inf"), min_score=0.0), ["a", "b", "c"], [1.0, 99.0, None])
    assert abs(shares["a"] - 0.5) < 0.03 and shares["c"] == 0


def test_without_a_score_that_is_high_enough_the_best_caption_is_drawn_and_without_scores_any():
    assert _drawn(CaptionConfig(), ["a", "b", "c"], [20.0, 24.0, None], 50) == {"a": 0, "b": 1, "c": 0}
    assert _drawn(CaptionConfig(min_score=0.0), ["a", "b"], [None, 0.0], 50) == {"a": 0, "b": 1}
    assert min(_drawn(CaptionConfig(), ["a", "b", "c"], []).values()) > 0.3


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"min_score": -1.0}, {"min_score": float("nan")}])
def test_a_draw_that_cannot_be_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        CaptionConfig(**fields)


@pytest.fixture
def described(tmp_path):
    """A folder and a tar file with the same two pictures, as NVlabs/Sana describes them."""
    files = {
        "cat.txt": b"cat\n",
        "cat_VILA.json": json.dumps({"cat": {"VILA": "a grey cat"}}).encode(),
        "cat_VILA_clip_score.json": json.dumps({"cat": {"VILA": "31.5"}}).encode(),
        "dog.txt": b"dog\n",
        "dog_prompt_clip_score.json": json.dumps({"dog": {"prompt": "19"}}).encode(),
    }
    folder, tars = tmp_path / "folder", tmp_path / "tars"
    for made in (folder, tars):
        made.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name in ("cat", "dog"):
        (folder / f"{name}.png").write_bytes(_png())
    with tarfile.open(tars / "shard.tar", "w") as tar:
        for name in ("cat", "dog"):
            for suffix, content in ((".png", _png()), (".json", json.dumps({"prompt": name, "height": 8}).encode())):
                member = tarfile.TarInfo(f"part/{name}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tars / "shard_VILA.json").write_text(json.dumps({"part/cat": {"VILA": "a grey cat"}}))
    scores = {"part/cat": {"VILA": "31.5"}, "part/dog": {"prompt": 19}}
    (tars / "shard_VILA_clip_score.json").write_text(json.dumps(scores))
    return {"folder": folder, "tars": tars}


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_a_set_keeps_captions_and_scores(described, tmp_path, kind, capsys):
    assert command.main(["build", "folder", f"--input={described[kind]}", f"--output={tmp_path / 'set'}"]) == 0
    read = [record for _, record in records.read_dataset(tmp_path / "set")]
    assert [record.captions for record in read] == [("cat", "a grey cat"), ("dog",)]
    assert [record.scores for record in read] == [(None, 31.5), (19.0,)]
    assert "2 of them with captions that have scores" in capsys.readouterr().out


def test_training_draws_by_the_scores_of_the_set(described, tmp_path):
    folder_build.build(described["folder"], tmp_path / "set")
    loader = make_loader(LoaderConfig(path=str(tmp_path / "set"), image_size=8, batch_size=2), seed=0)
    texts = {text for _, batch in zip(range(8), loader, strict=False) for text in batch["captions"]}
    assert texts == {"a grey cat", "dog"}


def test_pictures_of_a_low_score_can_be_left_out(described, tmp_path, capsys):
    index = folder_build.build(described["folder"], tmp_path / "set", min_score=22.0)
    assert (index["scored"], index["low_score"], index["shards"][0]["records"]) == (1, 1, 1)
    arguments = ["build", "folder", f"--input={described['tars']}", f"--output={tmp_path / 'none'}", "--min_score=40"]
    assert command.main(arguments) == 2
    assert "none of the 2 pictures" in (told := capsys.readouterr().err) and "2 have a best score below" in told
    assert command.main([*arguments[:-1], "--min_score=nan"]) == 2
    assert "--min_score=nan is no score" in capsys.readouterr().err


def test_cosines_in_place_of_scores_are_warned_of(described, tmp_path, capsys):
    for name, score in (("cat_VILA", {"cat": {"VILA": 0.31}}), ("dog_prompt", {"dog": {"prompt": 0.2}})):
        (described["folder"] / f"{name}_clip_score.json").write_text(json.dumps(score))
    assert command.main(["build", "folder", f"--input={described['folder']}", f"--output={tmp_path / 'set'}"]) == 0
    assert "warning: no score is above 0.31; scores are CLIP's cosines times 100" in capsys.readouterr().err


def test_a_file_beside_a_tar_file_that_is_no_json_is_told_before_anything_is_written(described, tmp_path):
    (described["tars"] / "shard_VILA.json").write_text("no JSON")
    with pytest.raises(ValueError, match=r"^shard_VILA\.json is no JSON"):
        folder_build.build(described["tars"], tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_files_stand_beside_the_one_whose_whole_name_they_begin_with(described, tmp_path, kind):
    """And not beside one whose name is shorter, though its pictures have the same names."""
    own = {"folder": "cat", "tars": "shard"}[kind]
    for file in [*described[kind].iterdir()]:
        if file.name.startswith(own):
            shutil.copyfile(file, file.with_name(file.name.replace(own, f"{own}_2", 1)))
    for name in ("_VILA", "_VILA_clip_score"):
        (described[kind] / f"{own}{name}.json").unlink()
    other = described[kind] / f"{own}_2_VILA.json"
    other.write_text(other.read_text().replace('{"cat"', '{"cat_2"'))  # of a folder's pictures
    folder_build.build(described[kind], tmp_path / "set")
    read = {record.key: record.captions for _, record in records.read_dataset(tmp_path / "set")}
    name = {"folder": "cat{}.png", "tars": "shard{}.tar/part/cat.png"}[kind]
    assert (read[name.format("")], read[name.format("_2")]) == (("cat",), ("cat", "a grey cat"))


def test_scores_without_a_caption_are_said(described, tmp_path, capsys):
    (described["folder"] / "dog_prompt_clip_score.json").write_text(json.dumps({"dog": {"promt": 30}}))
    assert command.main(["build", "folder", f"--input={described['folder']}", f"--output={tmp_path / 'set'}"]) == 0
    assert "warning: 1 pictures have scores of captions that they do not have" in capsys.readouterr().err
