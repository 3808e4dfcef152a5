"""`python -m sana_jax.export`: what it writes draws the pipeline's pictures, StableHLO without sana_jax."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import compilation_cache_off, tiny_parts, tiny_sprint_parts

from sana_jax import SanaPipeline
from sana_jax.export.__main__ import main
from sana_jax.prompts import tokenize_prompts
from sana_jax.weights import folder

# Runs a script as a user would who has no sana_jax.
WITHOUT_SANA_JAX = """
import runpy, sys
sys.modules["sana_jax"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
INSTRUCTION = ("Think of a picture, then draw it:", "User Prompt: ")


def save(path, parts, **defaults):
    named = dict(zip(("transformer", "autoencoder", "text_encoder"), parts[:3], strict=True))
    defaults = folder.SamplingDefaults(max_sequence_length=12, **defaults)
    folder.save_pipeline(path, tokenizer=parts.tokenizer, defaults=defaults, **named)
    return str(path)


def run_alone(script, *flags):
    command = [sys.executable, "-c", WITHOUT_SANA_JAX, str(script), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("family", ["sana", pytest.param("sprint", marks=pytest.mark.slow)])
def test_stablehlo_draws_any_number_of_the_same_pictures_without_sana_jax(tmp_path, family):
    if family == "sana":
        model = save(
            tmp_path / "model",
            tiny_parts(),
            complex_human_instruction=INSTRUCTION,
            num_inference_steps=3,
            pag_scale=2.0,
        )
    else:
        model = save(tmp_path / "model", tiny_sprint_parts(), complex_human_instruction=None, solver="scm")
    output = tmp_path / "exported"
    assert (
        main(["stablehlo", f"--model={model}", f"--output={output}", "--steps=3", "--height=8", "--platforms=cpu,tpu"])
        == 0
    )
    prompts, negative = [" A red Apple", "fox"], {"sana": {"negative_prompt": "pear"}, "sprint": {}}[family]
    pipe = SanaPipeline.from_pretrained(model)
    expected = pipe(prompts, seed=5, height=8, guidance_scale=3.0, num_inference_steps=3, **negative)
    flags = [f"--prompt={prompt}" for prompt in prompts] + [f"--{name}={text}" for name, text in negative.items()]
    done = run_alone(output / "draw.py", *flags, "--guidance=3", "--seed=5", f"--out={tmp_path / 'a.png'}")
    assert done.returncode == 0, done.stderr
    for index, picture in enumerate(expected):
        drawn = np.asarray(Image.open(tmp_path / f"a_{index:03d}.png"), int)
        assert drawn.shape == (8, 16, 3)
        assert np.abs(drawn - np.asarray(picture, int)).max() <= 1
    done = run_alone(output / "draw.py", "--prompt=fox", f"--out={tmp_path / 'one.png'}")
    assert done.stdout == f"{tmp_path / 'one.png'}\n", done.stderr


def test_the_script_numbers_more_than_a_thousand_pictures_so_that_their_names_sort(tmp_path, monkeypatch):
    from sana_jax.export import draw

    (tmp_path / "settings.json").write_text('{"null_length": null}')
    monkeypatch.setattr(draw, "FOLDER", tmp_path)
    monkeypatch.setattr(draw, "draw", lambda settings, prompts, *rest: np.zeros((len(prompts), 4, 4, 3)))
    monkeypatch.setattr(sys, "argv", ["draw.py", *["--prompt=fox"] * 1001, f"--out={tmp_path / 'x.png'}"])
    assert draw.main() == 0
    assert sorted(file.name for file in tmp_path.glob("*.png")) == [f"x_{index:04d}.png" for index in range(1001)]


def test_the_script_of_the_folder_has_our_tokens(tmp_path):
    from sana_jax.export import draw

    tokenizer = tiny_parts().tokenizer
    prompts = [" A red APPLE on a blue background, the quick brown fox, a green pear ", ""]
    for instruction in (INSTRUCTION, None):
        ids, mask = tokenize_prompts(tokenizer, prompts, instruction, 12)
        settings, prefix = {"lower_case": True}, "\n".join(instruction or ())
        for ours, theirs in zip(
            (ids, mask), draw.tokenize(settings, tokenizer, prompts, prefix, ids.shape[1]), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_a_program_without_guidance_takes_no_negative_prompt(tmp_path):
    model = save(tmp_path / "model", tiny_parts(), complex_human_instruction=None, num_inference_steps=1)
    output = tmp_path / "exported"
    assert main(["stablehlo", f"--model={model}", f"--output={output}", "--guidance=1", "--platforms=cpu"]) == 0
    assert json.loads((output / "settings.json").read_text())["null_length"] is None
    done = run_alone(output / "draw.py", "--prompt=fox", "--negative_prompt=pear")
    assert (done.returncode, "exported without guidance" in done.stderr) == (2, True)
    done = run_alone(output / "draw.py", "--prompt=fox", "--guidance=3")
    assert (done.returncode, "--guidance: this program was exported without it" in done.stderr) == (2, True)
    for file in output.iterdir():
        assert file.stat().st_mode == (output / "settings.json").stat().st_mode, file


@pytest.mark.parametrize(
    ("out", "message"), [("nowhere/x.png", "cannot be written"), ("", "cannot be written"), ("x", "no ending")]
)
def test_the_script_of_the_folder_refuses_a_file_that_it_cannot_write_before_it_draws(
    tmp_path, capsys, monkeypatch, out, message
):
    from sana_jax.export import draw

    (tmp_path / "settings.json").write_text(json.dumps({"null_length": None}))
    monkeypatch.setattr(draw, "FOLDER", tmp_path)
    monkeypatch.setattr(draw, "draw", None)
    monkeypatch.setattr(sys, "argv", ["draw.py", "--prompt=fox", f"--out={tmp_path / out}"])
    with pytest.raises(SystemExit) as ending:
        draw.main()
    assert ending.value.code == 2 and message in capsys.readouterr().err


def test_executables_of_the_command_line_are_those_of_the_pipeline(tmp_path, capsys):
    model = save(tmp_path / "model", tiny_parts(), complex_human_instruction=None, num_inference_steps=2)
    with compilation_cache_off():
        assert main(["executable", f"--model={model}", f"--output={tmp_path / 'made'}", "--pictures=2"]) == 0
    assert ".executable" in capsys.readouterr().out
    pipe = SanaPipeline.from_pretrained(model, executables=tmp_path / "made")
    assert any("2 pictures of 16x16 in 2 steps" in call["title"] for call in pipe.programs._calls())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["executable", "--pictures=0"], "--pictures=0"),
        (["executable", "--steps=0"], "steps"),
        (["executable", "--height=17"], "17"),
        (["executable", "--model=nowhere"], "nowhere"),
        (["stablehlo", "--platforms=cpu,metal"], "there are cpu, cuda, rocm, tpu"),
        (["stablehlo", "--guidance=-1"], "guidance"),
        (["stablehlo", "--quantization=fp8"], "quantization='fp8'"),
        (["stablehlo", "--width=-16"], "-16"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, flags, message):
    assert main([*flags, f"--output={tmp_path / 'new'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("kept")
    assert main(["stablehlo", f"--output={tmp_path}"]) == 2
    assert "holds notes.txt and no exported sampler" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "kept"
