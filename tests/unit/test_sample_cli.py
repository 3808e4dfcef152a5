"""sample.py as a person calls it: files, their metadata, and one clear line for input that cannot be used."""

import contextlib
import errno
import gc
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from tiny_pipeline import tiny_parts, tiny_sprint_parts

from sana_jax import SanaPipeline, atomic
from sana_jax.sampling import picture_files
from sana_jax.weights import folder

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import sample


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    folder.save_pipeline(path, **tiny_parts()._asdict())
    return path


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setattr(sample, "_keep_compiled_programs", lambda jax: None)


@pytest.fixture(scope="module", autouse=True)
def one_pipeline():
    """Loading again would compile again."""
    pipe = SanaPipeline(tiny_parts())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SanaPipeline, "from_pretrained", lambda *args, **kwargs: pipe)
        yield pipe


def run(*arguments):
    return sample.main(list(map(str, arguments)))


def write(out, pictures, prompts, num_images=1, waiting=4):
    """What `sample.draw` does with the pictures of a list."""
    arguments = sample.parse(["--prompts_file=x", f"--out={out}", f"--num_images={num_images}"])
    identities = [{"prompt": prompt, "seed": 0, "index": index} for index, prompt in enumerate(prompts)]
    sample.write(arguments, identities, {}, pictures, set(), waiting)


def test_one_picture_is_one_file_with_its_settings_inside(model, tmp_path, capsys, one_pipeline):
    out = tmp_path / "new folder" / "apple.png"
    arguments = ("--guidance=3", "--seed=7", "--negative_prompt=x", f"--model={model}", f"--out={out}")
    assert run("--prompt=A red apple", *arguments) == 0
    picture = Image.open(out)
    assert (picture.text["prompt"], picture.text["seed"]) == ("A red apple", "7")
    assert json.loads(picture.text["settings"]) == {
        "negative_prompt": "x",
        "model": str(model),
        "height": 16,
        "width": 16,
        "binning": False,
        "steps": 3,
        "guidance": 3.0,
        "solver": "flow_dpm",
        "dtype": "float32",
        "quantization": None,
    }
    expected = one_pipeline("A red apple", negative_prompt="x", guidance_scale=3.0, seed=7)[0]
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
    assert [f.name for f in out.parent.iterdir()] == ["apple.png"] and str(out) in capsys.readouterr().out


def test_a_model_is_loaded_quantised_and_the_picture_says_so(model, tmp_path, monkeypatch, one_pipeline):
    asked, out = {}, tmp_path / "out.png"
    monkeypatch.setattr(SanaPipeline, "from_pretrained", lambda path, **kwargs: asked.update(kwargs) or one_pipeline)
    assert run("--prompt=a fox", f"--model={model}", f"--out={out}", "--quantization=int8") == 0
    assert (asked["dtype"], asked["quantization"]) == ("float32", "int8")
    assert json.loads(Image.open(out).text["settings"])["quantization"] == "int8"


def test_several_prompts_make_numbered_files_and_a_grid(model, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n\n  ein grüner Apfel 🍏 \na fox\n", encoding="utf-8")
    out = tmp_path / "out.png"
    assert run(f"--prompts_file={prompts}", f"--model={model}", f"--out={out}", "--num_images=2") == 0
    names = sorted(f.name for f in tmp_path.glob("*.png"))
    assert names == ["out.png", *(f"out_{i:03d}.png" for i in range(6))]
    singles = [Image.open(tmp_path / name) for name in names[1:]]
    assert [s.text["prompt"] for s in singles[1:4]] == ["a red apple", "ein grüner Apfel 🍏", "ein grüner Apfel 🍏"]
    assert [s.text["index"] for s in singles] == list("012345")
    grid = np.asarray(Image.open(out))
    assert grid.shape == (3 * 16 + 2 * picture_files.GAP, 2 * 16 + picture_files.GAP, 3)
    np.testing.assert_array_equal(grid[20:36, 20:36], np.asarray(singles[3]))
    assert "drawing 6 of 6 (3 steps" in capsys.readouterr().err


def test_the_names_of_more_than_a_thousand_pictures_sort_as_they_are_numbered(tmp_path):
    write(tmp_path / "x.png", [Image.new("RGB", (4, 4))] * 1001, ["fox"] * 1001)
    names = sorted(file.name for file in tmp_path.glob("x_*.png"))
    assert [Image.open(tmp_path / name).text["index"] for name in names] == list(map(str, range(1001)))
    assert names[0] == "x_0000.png" and names[-1] == "x_1000.png"


def test_pictures_drawn_before_an_interrupt_are_kept_whole(model, tmp_path, monkeypatch, capsys, one_pipeline):
    calls = []

    def interrupted(self, prompts, **settings):
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [Image.new("RGB", (16, 16), (len(calls), 0, 0)) for _ in prompts]

    monkeypatch.setattr(SanaPipeline, "__call__", interrupted)
    monkeypatch.setattr(sample, "LARGEST_BATCH", 2)
    assert run("--prompt=fox", "--num_images=6", f"--model={model}", f"--out={tmp_path / 'fox.png'}") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "sample.py: interrupted"
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"fox_{i:03d}.png" for i in range(4)]
    assert [Image.open(tmp_path / f"fox_{i:03d}.png").getpixel((0, 0))[0] for i in range(4)] == [1, 1, 2, 2]


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_run_that_was_ended_and_resumed_has_the_files_of_one_that_was_not(
    model, tmp_path, monkeypatch, capsys, one_pipeline
):
    (tmp_path / "whole").mkdir()
    (tmp_path / "ended").mkdir()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\nein grüner Apfel 🍏\na fox\n")
    monkeypatch.setattr(sample, "LARGEST_BATCH", 3)
    arguments = (f"--prompts_file={prompts}", "--num_images=3", "--seed=5", f"--model={model}")
    assert run(*arguments, f"--out={tmp_path / 'whole' / 'x.png'}") == 0
    ended = (*arguments, f"--out={tmp_path / 'ended' / 'x.png'}")

    drawing, calls = SanaPipeline.__call__, []

    def ending_at_the_second_batch(self, prompts, **settings):
        calls.append(prompts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return drawing(self, prompts, **settings)

    monkeypatch.setattr(SanaPipeline, "__call__", ending_at_the_second_batch)
    assert run(*ended) == 130
    (tmp_path / "ended" / "x_001.png").unlink()
    kept = (tmp_path / "ended" / "x_000.png").stat().st_ino
    capsys.readouterr()
    assert run(*ended, "--resume") == 0
    captured = capsys.readouterr()
    assert contents(tmp_path / "ended") == contents(tmp_path / "whole")
    assert (tmp_path / "ended" / "x_000.png").stat().st_ino == kept
    assert "2 of 9 pictures are there and are not drawn again" in captured.err
    names = [pathlib.Path(line).name for line in captured.out.splitlines()]
    assert names == ["x_001.png", *(f"x_{i:03d}.png" for i in range(3, 9)), "x.png"]

    (tmp_path / "ended" / "x_008.png").unlink()
    calls.clear()
    assert run(*ended, "--resume") == 0
    assert calls == [["a fox"] * 3] and contents(tmp_path / "ended") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "change,message",
    [
        ("--seed=1", "x_000.png is there and was drawn with seed='0', not '1'; give the flags it was drawn with"),
        ("--guidance=2", "x_000.png is there and was drawn with guidance=4.5, not 2.0; give"),
        ("--prompt=a wolf", "x_000.png is there and was drawn with prompt='a fox', not 'a wolf'; give"),
        (None, "x_001.png is there and was not drawn by sample.py; move it away or give another --out."),
    ],
)
def test_a_picture_of_another_run_is_not_taken_for_one_of_this(model, tmp_path, monkeypatch, capsys, change, message):
    arguments = ["--prompt=a fox", "--num_images=2", f"--model={model}", f"--out={tmp_path / 'x.png'}"]
    assert run(*arguments) == 0
    if change is None:
        Image.new("RGB", (16, 16)).save(tmp_path / "x_001.png")
    elif change.startswith("--prompt"):
        arguments[0] = change
    else:
        arguments.append(change)
    before = contents(tmp_path)
    monkeypatch.setattr(SanaPipeline, "__call__", None)
    assert run(*arguments, "--resume") == 2
    assert f"sample.py: error: {tmp_path / message}" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_damaged_picture_is_named_when_its_run_is_resumed(model, tmp_path, capsys):
    arguments = ("--prompt=a fox", "--num_images=2", f"--model={model}", f"--out={tmp_path / 'x.png'}")
    assert run(*arguments) == 0
    file = tmp_path / "x_001.png"
    file.write_bytes(file.read_bytes()[:-100])
    assert run(*arguments, "--resume") == 2
    assert f"{file} is damaged (" in capsys.readouterr().err
    file.unlink()
    assert run(*arguments, "--resume") == 0


def test_no_picture_is_held_once_it_is_written(tmp_path):
    alive = []

    def pictures():
        for index in range(40):
            assert sum(reference() is not None for reference in alive) <= 3 + 2, index
            picture = Image.new("RGB", (16, 16))
            alive.append(weakref.ref(picture))
            yield picture

    write(tmp_path / "x.png", pictures(), [f"prompt {i}" for i in range(40)], waiting=3)
    assert len(list(tmp_path.iterdir())) == 41


def test_a_picture_is_written_while_the_next_is_drawn(tmp_path, monkeypatch):
    drawing, save = threading.Event(), picture_files.save

    def save_once_the_next_is_drawn(picture, file, *texts):
        assert file.name != "x_000.png" or drawing.wait(20)
        save(picture, file, *texts)

    def pictures():
        yield Image.new("RGB", (16, 16))
        assert not list(tmp_path.iterdir())
        drawing.set()
        yield Image.new("RGB", (16, 16))

    monkeypatch.setattr(picture_files, "save", save_once_the_next_is_drawn)
    write(tmp_path / "x.png", pictures(), ["a red apple", "a fox"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.png", "x_000.png", "x_001.png"]


def test_a_full_disk_is_one_line_and_the_pictures_before_it_are_whole(model, tmp_path, monkeypatch, capsys):
    write_file = atomic.write_file

    def full(file, content):
        write_file(file, itertools.chain(content, no_space()) if file.name >= "fox_003.png" else content)

    def no_space():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    monkeypatch.setattr(atomic, "write_file", full)
    monkeypatch.setattr(sample, "LARGEST_BATCH", 2)
    assert run("--prompt=fox", "--num_images=8", f"--model={model}", f"--out={tmp_path / 'fox.png'}") == 2
    captured, files = capsys.readouterr(), [f"fox_{i:03d}.png" for i in range(3)]
    assert captured.err.splitlines()[-1] == "sample.py: error: [Errno 28] No space left on device"
    assert sorted(f.name for f in tmp_path.iterdir()) == files
    assert captured.out.splitlines() == [str(tmp_path / file) for file in files]
    assert all(Image.open(tmp_path / file).getextrema() for file in files)


@pytest.mark.parametrize(
    "said",
    ["RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nmore", "INTERNAL: Out of memory allocating 5 bytes."],
)
def test_too_little_memory_is_one_line_that_says_what_takes_less(model, tmp_path, monkeypatch, capsys, said):
    def exhausted(self, prompts, **settings):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(SanaPipeline, "__call__", exhausted)
    arguments = ("--prompt=fox", f"--model={model}", f"--out={tmp_path / 'fox.png'}")
    assert run(*arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sample.py: error: the device has too little memory for this (")
    assert "Out of memory allocating 5 bytes.); smaller --height and --width, --dtype=bfloat16 or" in line
    for flag in re.findall(r"--\w+(?:=[\w=]+)?", line):
        sample.parse([flag if "=" in flag else f"{flag}=16"])


def test_a_failed_write_keeps_nothing_alive_once_it_is_told(tmp_path):
    """What it did, the garbage collector broke up at the exit, where JAX 0.12 ended with a segmentation fault."""
    picture = Image.new("RGB", (4, 4))
    alive = weakref.ref(picture)
    gc.disable()
    try:
        with contextlib.suppress(FileNotFoundError), picture_files.Writer(1, written=print) as writer:
            writer.save(picture, tmp_path / "nowhere" / "x.png", {}, {})
        del picture
        assert alive() is None
    finally:
        gc.enable()


def test_another_error_of_jax_is_not_taken_for_one_of_memory(model, tmp_path, monkeypatch):
    def failing(self, prompts, **settings):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is lost")

    monkeypatch.setattr(SanaPipeline, "__call__", failing)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the device is lost"):
        run("--prompt=fox", f"--model={model}", f"--out={tmp_path / 'fox.png'}")


@pytest.mark.parametrize(
    "count,side,reduction", [(64, 1024, 1), (65, 1024, 2), (4, 4096, 1), (10_000, 1024, 14), (10_000, 64, 1)]
)
def test_a_grid_is_reduced_to_what_64_pictures_of_1024_take(count, side, reduction):
    grid = picture_files.Grid(count, 1, (side, side))
    assert grid.reduction == reduction and math.prod(grid.image.size) <= picture_files.LARGEST_GRID


@pytest.mark.parametrize(
    "count,num_images,columns",
    [(9, 1, 3), (9, 9, 3), (6, 2, 2), (64, 2, 2), (66, 2, 8), (20_500, 2, 144), (64, 32, 32), (66, 33, 9)],
)
def test_a_grid_has_a_row_for_each_prompt_and_a_long_one_is_nearly_square(count, num_images, columns):
    assert picture_files.grid_columns(count, num_images) == columns


def test_the_pictures_of_a_prompt_stand_side_by_side_in_a_long_grid(tmp_path):
    colours = [(index // 2, index % 2, 0) for index in range(130)]
    write(tmp_path / "x.png", [Image.new("RGB", (4, 4), c) for c in colours], ["fox"] * 130, num_images=2)
    grid = np.asarray(Image.open(tmp_path / "x.png"))[:: 4 + picture_files.GAP, :: 4 + picture_files.GAP]
    assert grid.shape == (11, 12, 3)
    np.testing.assert_array_equal(grid.reshape(-1, 3)[:130], colours)


@pytest.mark.parametrize("length,kept", [(400_000, True), (600_000, False)])
def test_a_grid_carries_its_prompts_unless_they_are_very_long(tmp_path, length, kept):
    write(tmp_path / "x.png", [Image.new("RGB", (4, 4))] * 2, ["fox " * (length // 4)] * 2)
    assert ("prompt" in Image.open(tmp_path / "x.png").text) == kept
    assert len(Image.open(tmp_path / "x_001.png").text["prompt"]) == length


def test_a_reduced_grid_shows_the_pictures_in_their_places_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(picture_files, "LARGEST_GRID", 4 * (8 + picture_files.GAP) ** 2)
    pictures = [Image.new("RGB", (16, 16), (value, 0, 0)) for value in (10, 20, 30)]
    write(tmp_path / "x.png", pictures, list("abc"))
    grid = np.asarray(Image.open(tmp_path / "x.png"))
    assert grid.shape == (20, 20, 3)
    assert [grid[0, 0, 0], grid[7, 19, 0], grid[12, 7, 0], grid[19, 19, 0]] == [10, 20, 30, 255]
    assert Image.open(tmp_path / "x_002.png").size == (16, 16)
    captured = capsys.readouterr()
    assert "x.png shows the pictures at 1/2 of their height and width" in captured.err
    assert captured.out.splitlines() == [
        str(tmp_path / name) for name in ("x_000.png", "x_001.png", "x_002.png", "x.png")
    ]


def test_batches_of_one_size_give_the_pictures_of_one_batch(model, tmp_path, monkeypatch):
    arguments = ("--prompt=fox", "--num_images=6", f"--model={model}")
    assert run(*arguments, f"--out={tmp_path / 'whole.png'}") == 0
    monkeypatch.setattr(sample, "LARGEST_BATCH", 4)
    assert run(*arguments, f"--out={tmp_path / 'parts.png'}") == 0
    whole, parts = (np.asarray(Image.open(tmp_path / f"{name}.png"), np.int16) for name in ("whole", "parts"))
    assert np.abs(whole - parts).max() <= 1


@pytest.mark.parametrize(
    "jobs,side,mesh,pictures",
    [
        (1, 1024, {}, 1),
        (17, 64, {}, 9),
        (33, 64, {}, 11),
        (40, 256, {}, 14),
        (10_001, 64, {}, 16),
        (40, 256, {"data": 4, "fsdp": 1, "seq": 1}, 40),
        (100, 256, {"data": 2, "fsdp": 2, "seq": 1}, 52),
        (3, 1024, {"data": 2, "fsdp": 1, "seq": 1}, 2),
        (3, 1024, {"data": 1, "fsdp": 1, "seq": 2}, 2),
        (3, 4096, {"data": 2, "fsdp": 1, "seq": 4}, 2),
    ],
)
def test_every_device_has_as_many_pictures_and_the_last_call_is_nearly_full(jobs, side, mesh, pictures):
    assert sample.batch_size(jobs, side * side, mesh) == pictures


def test_devices_are_asked_for_by_axis(model, tmp_path, capsys, one_pipeline, monkeypatch):
    seen = []
    monkeypatch.setattr(
        SanaPipeline, "from_pretrained", lambda *args, mesh, **kwargs: seen.append(dict(mesh.shape)) or one_pipeline
    )
    arguments = ("--prompt=fox", f"--model={model}", f"--out={tmp_path / 'fox.png'}")
    assert run(*arguments, "--mesh=seq=1") == 0
    assert seen == [{"data": 1, "fsdp": 1, "seq": 1}]
    assert run(*arguments, "--mesh=data=32,seq=2") == 2
    assert "mesh.data=32, mesh.fsdp=1, mesh.seq=2 need 64 devices, there are" in capsys.readouterr().err


def test_a_lora_is_passed_on_and_named_in_the_settings(model, tmp_path, one_pipeline, monkeypatch, capsys):
    seen, file = [], tmp_path / "x.safetensors"
    monkeypatch.setattr(
        SanaPipeline,
        "from_pretrained",
        lambda *args, lora, lora_scale, **kwargs: seen.append((lora, lora_scale)) or one_pipeline,
    )

    def write(value):
        factors = {f"proj_out.lora_{side}.weight": np.full((3, 3), value, np.float32) for side in "AB"}
        safetensors.numpy.save_file(factors, file)

    write(1)
    out, arguments = tmp_path / "fox.png", ("--prompt=fox", f"--model={model}", f"--out={tmp_path / 'fox.png'}")
    for flags, scale in (((), 1.0), (("--lora_scale=0.5",), 0.5)):
        assert run(*arguments, f"--lora={tmp_path}", *flags) == 0
        assert seen.pop() == (file, scale)
        settings = json.loads(Image.open(out).text["settings"])
        assert (settings["lora"], settings["lora_scale"]) == (str(tmp_path), scale)
    resumed = (*arguments, f"--lora={file.parent}", "--lora_scale=0.5", "--resume")
    assert run(*resumed) == 0 and "1 of 1 pictures are there" in capsys.readouterr().err
    write(2)
    assert run(*resumed) == 2 and "lora_digest" in capsys.readouterr().err
    assert run(*arguments) == 0
    assert seen[-1] == (None, 1.0) and "lora" not in json.loads(Image.open(out).text["settings"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora=absent.safetensors"], "there is no LoRA absent.safetensors"),
        (["--lora=tests"], "tests has neither pytorch_lora_weights.safetensors"),
        (["--lora_scale=0.5"], "--lora_scale=0.5 needs --lora=FILE"),
        (["--lora=tests", "--lora_scale=inf"], "--lora_scale=inf needs --lora=FILE, and is a finite number"),
    ],
)
def test_a_lora_that_cannot_be_is_refused_before_anything_is_loaded(tmp_path, capsys, flags, message):
    assert run("--prompt=fox", f"--out={tmp_path / 'fox.png'}", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_picture_to_start_from_is_turned_upright_and_named_in_the_settings(model, tmp_path, one_pipeline):
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    file, out = tmp_path / "start.png", tmp_path / "out.png"
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    start.transpose(Image.Transpose.ROTATE_180).save(file, exif=exif)
    assert run("--prompt=fox", f"--image={file}", "--strength=0.5", f"--model={model}", f"--out={out}") == 0
    expected = one_pipeline("fox", image=start, strength=0.5)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(expected))
    settings = json.loads(Image.open(out).text["settings"])
    assert (settings["image"], settings["strength"], settings["steps"]) == (str(file), 0.5, 3)


def test_a_sprint_model_takes_its_own_steps_and_noise_and_no_negative_prompt(tmp_path, monkeypatch, capsys):
    folder.save_pipeline(tmp_path / "sprint", **tiny_sprint_parts()._asdict())
    pipe = SanaPipeline(tiny_sprint_parts())
    monkeypatch.setattr(SanaPipeline, "from_pretrained", lambda *args, **kwargs: pipe)
    arguments = ("--prompt=fox", f"--model={tmp_path / 'sprint'}", "--seed=2", f"--out={tmp_path / 'out.png'}")
    assert run(*arguments) == 0
    picture = Image.open(tmp_path / "out.png")
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(pipe("fox", seed=2)[0]))
    settings = json.loads(picture.text["settings"])
    assert (settings["steps"], settings["guidance"], settings["solver"]) == (2, 4.5, "scm")
    monkeypatch.setattr(sample, "draw", None)
    assert run(*arguments, "--negative_prompt=blurry") == 2
    assert "negative prompt 'blurry': a SANA-Sprint model has its guidance built in" in capsys.readouterr().err
    assert run(*arguments, "--solver=flow_dpm") == 2
    assert "solver flow_dpm does not fit this SANA-Sprint model; use scm." in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--promt=a fox"], "unknown flag --promt; the nearest is --prompt."),
        (["--prompt=a fox", "--num_steps=4"], "unknown flag --num_steps; the nearest is --steps."),
        (["--prompt", "a", "fox"], "'fox' is not a flag; put texts with spaces in quotes"),
        (["--prompt="], "the prompt is empty"),
        (["--prompt=   "], "the prompt is empty"),
        (
            ["--prompt=caf\udce9"],
            r"--prompt='caf\udce9' is not Unicode text: its character 3 is the surrogate '\udce9'",
        ),
        (["--prompt=fox", "--negative_prompt=\udce9"], r"--negative_prompt='\udce9' is not Unicode text"),
        ([], 'give either --prompt="..." or --prompts_file=FILE.'),
        (["--prompt=fox", "--prompts_file=x"], "give either"),
        (["--prompts_file=nowhere.txt"], "--prompts_file=nowhere.txt cannot be read (No such file or directory)"),
        (["--prompts_file=/"], "--prompts_file=/ cannot be read (Is a directory); give a text file with one prompt"),
        (["--prompt=fox", "--steps=0"], "steps 0: at least 1 is needed"),
        (["--prompt=fox", "--steps=many"], "argument --steps: invalid int value: 'many'"),
        (["--prompt=fox", "--guidance=nan"], "guidance nan is not a number of at least 0"),
        (["--prompt=fox", "--guidance=-2"], "guidance -2.0"),
        (["--prompt=fox", "--num_images=0"], "number of images 0"),
        (["--prompt=fox", "--seed=-1"], "seed -1 is not in 0..4294967295"),
        (["--prompt=fox", "--height=18"], "height 18 is not a positive multiple of 4; use 16 or 20."),
        (["--prompt=fox", "--width=-4"], "width -4 is not a positive multiple of 4; use 4."),
        (["--prompt=fox", "--bining"], "unknown flag --bining; the nearest is --binning."),
        (["--prompt=fox", "--binning"], "this one has sample_size 4 and factor 4. Switch binning off"),
        (["--prompt=fox", "--no-binning", "--width=9"], "width 9 is not a positive multiple of 4; use 8 or 12."),
        (["--prompt=fox", "--solver=ddim"], "argument --solver: invalid choice: 'ddim'"),
        (["--prompt=fox", "--out=fox.jpg"], "--out=fox.jpg does not end in .png"),
        (["--prompt=fox", "--solver=scm"], "solver scm does not fit this SANA model; use flow_dpm or flow_euler."),
        (["--prompt=fox", "--strength=0.5"], "strength 0.5 is given and no image"),
        (["--prompt=fox", "--image=/nowhere.png"], "--image=/nowhere.png is not a file."),
        (["--prompt=fox", f"--image={__file__}", "--strength=0"], "strength 0.0 is not above 0 and at most 1"),
        (
            ["--prompt=fox", f"--image={__file__}"],
            "test_sample_cli.py is not a picture that can be read: cannot identify",
        ),
        (["--prompt=fox", "--control_image=/nowhere.png"], "--control_image=/nowhere.png is not a file."),
        (["--prompt=fox", f"--control_image={__file__}"], "a control image is given, and the model has no ControlNet"),
        (["--prompt=fox", "--controlnet=x"], "the model has a ControlNet and no control image is given"),
        (["--prompt=fox", "--controlnet_scale=0.5"], "ControlNet scale 0.5 is given and no control image"),
        (
            ["--prompt=fox", "--controlnet=x", f"--control_image={__file__}", "--controlnet_scale=nan"],
            "ControlNet scale nan is not a finite number",
        ),
        (
            ["--prompt=fox", "--controlnet=x", f"--control_image={__file__}"],
            "--control_image=" + __file__ + " is not a picture that can be read",
        ),
        (["--prompt=fox", "--controlnet_wiring=x"], "argument --controlnet_wiring: invalid choice: 'x'"),
        (["--prompt=fox", "--mesh=4"], "argument --mesh: '4' is no mesh: give sizes of data, fsdp or seq, each once"),
        (["--prompt=fox", "--mesh=seq=2,seq=4"], "argument --mesh: 'seq=2,seq=4' is no mesh"),
        (["--prompt=fox", "--model=/nowhere"], "there is no folder /nowhere."),
        (["--prompt=fox", "--model=/"], "/ has no model_index.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, model, capsys, monkeypatch):
    monkeypatch.setattr(sample, "draw", None)
    if not any(a.startswith("--model") for a in arguments):
        arguments = [*arguments, f"--model={model}"]
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("sample.py: error: ") and message in captured.err


def test_a_public_model_takes_any_size_unless_binning_is_off(model, tmp_path, capsys, monkeypatch):
    public = tmp_path / "public"
    shutil.copytree(model, public)
    for file, change in (
        (public / "transformer" / "config.json", {"sample_size": 32}),
        (public / "vae" / "config.json", {"encoder_block_out_channels": [8] * 6}),
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    seen = []
    monkeypatch.setattr(
        sample, "draw", lambda arguments, prompts, height, width, *pictures: seen.append((height, width))
    )
    assert run("--prompt=fox", f"--model={public}", "--height=1001") == 0
    assert seen == [(1001, 1024)]
    assert run("--prompt=fox", f"--model={public}", "--height=0") == 2
    assert "height 0: at least 1 pixel" in capsys.readouterr().err
    assert run("--prompt=fox", f"--model={public}", "--height=1001", "--no-binning") == 2
    assert "height 1001 is not a positive multiple of 32" in capsys.readouterr().err


def test_a_height_in_the_models_settings_that_is_none_is_one_line_without_traceback(model, tmp_path, capsys):
    file = shutil.copytree(model, tmp_path / "bad") / "sana_jax.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"height": "64"}))
    assert run("--prompt=fox", f"--model={tmp_path / 'bad'}", f"--out={tmp_path / 'x.png'}") == 2
    assert capsys.readouterr().err == (
        f"sample.py: error: {file}: height is '64'; give it a whole number of at least 1, or null, as 1024.\n"
    )


def test_an_empty_prompts_file_and_one_that_is_no_text_are_named(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    for content, message in ((b"\n \n", "has no prompt in it"), (b"\xff\xfe\x00", "is not UTF-8 text")):
        file.write_bytes(content)
        assert run(f"--prompts_file={file}") == 2
        assert message in capsys.readouterr().err


def test_prompts_are_the_lines_of_a_file_and_end_at_newlines_alone(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("a\u2028red\x85apple\x0con\x0bblue\u2029ground\r\na fox\n".encode())
    prompts = sample.read_prompts(sample.parse([f"--prompts_file={file}"]))
    assert prompts == ["a\u2028red\x85apple\x0con\x0bblue\u2029ground", "a fox"]


def test_prompts_are_read_from_a_pipe():
    reading, writing = os.pipe()
    os.write(writing, b"a red apple\na fox\n")
    os.close(writing)
    assert sample.read_prompts(sample.parse([f"--prompts_file=/dev/fd/{reading}"])) == ["a red apple", "a fox"]
    os.close(reading)


def test_a_folder_as_output_is_refused(model, tmp_path, capsys):
    (tmp_path / "x.png").mkdir()
    assert run("--prompt=fox", f"--model={model}", f"--out={tmp_path / 'x.png'}") == 2
    assert "is a folder" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_drawing(model, capsys, monkeypatch):
    monkeypatch.setattr(sample, "draw", None)
    assert run("--prompt=fox", f"--model={model}", "--out=/proc/nowhere/x.png") == 2
    message = "sample.py: error: --out=/proc/nowhere/x.png cannot be written ([Errno 2] No such file or directory"
    assert capsys.readouterr().err.startswith(message)


def test_a_refused_call_makes_no_folder(model, tmp_path):
    arguments = ("--prompt=fox", f"--model={model}", f"--out={tmp_path / 'new' / 'x.png'}")
    assert run(*arguments, "--height=17") == run(*arguments, f"--image={__file__}") == 2
    assert not list(tmp_path.iterdir())


def test_a_damaged_model_is_one_line_without_traceback(model, tmp_path, capsys, monkeypatch):
    def damaged(*args, **kwargs):
        raise ValueError("weights do not fit:\n  missing a\n  missing b")

    monkeypatch.setattr(SanaPipeline, "from_pretrained", damaged)
    assert run("--prompt=fox", f"--model={model}", f"--out={tmp_path / 'x.png'}") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "sample.py: error: weights do not fit: missing a missing b"


def test_bad_input_is_refused_without_importing_jax_or_numpy(model):
    """In a process of its own, with the imports forbidden."""
    code = (
        "import sys; sys.modules.update(jax=None, numpy=None, flax=None, PIL=None, tokenizers=None); import sample; "
        f"sys.exit(sample.main(['--prompt=fox', '--height=17', '--model={model}']))"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "sample.py: error: height 17 is not a positive multiple of 4; use 16 or 20.\n"
    assert time.monotonic() - start < 5  # about 0.2 s on an idle machine


def test_the_compilation_cache_is_in_the_users_cache_folder(tmp_path):
    code = "import jax, sample; sample._keep_compiled_programs(jax); print(jax.config.jax_compilation_cache_dir)"
    env = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert done.stdout.strip() == str(tmp_path / "sana_jax" / "compiled"), done.stderr


def test_a_python_without_the_packages_says_how_to_have_them(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "jax", None)  # as an import that fails
    assert sample.main(["--prompt=fox", f"--out={tmp_path / 'fox.png'}"]) == 2
    assert "this Python has no jax; `source .venv/bin/activate`" in capsys.readouterr().err
