"""examples/public_checkpoint.py, on the embedded model and with diffusers."""

import dataclasses
import runpy

import pytest
from tiny_pipeline import tiny_parts, tiny_sprint_parts

from sana_jax.weights import folder

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
pytest.importorskip("diffusers")

from tiny_diffusers import allow_any_size


def test_the_export_gives_the_same_picture_here_and_in_diffusers(tmp_path, request, capsys):
    main = runpy.run_path(str(request.config.rootpath / "examples" / "public_checkpoint.py"))["main"]
    assert main([f"--out={tmp_path}", "--steps=4"]) == 0
    out = capsys.readouterr().out
    assert (
        "export, in diffusers: largest difference" in out and "export, loaded again: largest difference 0 of 255" in out
    )
    assert (tmp_path / "sana_jax.png").is_file() and (tmp_path / "diffusers.png").is_file()


@pytest.mark.parametrize("kind", ["SanaSprintPipeline", "SanaPAGPipeline"])
def test_a_model_of_another_pipeline_is_opened_as_that_in_diffusers(kind, tmp_path, request, capsys, monkeypatch):
    import diffusers

    parts = {"SanaSprintPipeline": tiny_sprint_parts(), "SanaPAGPipeline": tiny_parts()}[kind]
    if kind == "SanaPAGPipeline":
        parts = parts._replace(defaults=dataclasses.replace(parts.defaults, pag_scale=2.0))
    folder.save_pipeline(tmp_path / "model", **parts._asdict())
    allow_any_size(monkeypatch, getattr(diffusers, kind))
    main = runpy.run_path(str(request.config.rootpath / "examples" / "public_checkpoint.py"))["main"]
    assert main([f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", "--seed=3"]) == 0
    assert "export, in diffusers: largest difference" in capsys.readouterr().out


@pytest.mark.parametrize("setting", [{"null_mask": "prompt"}, {"lower_case": False}, {"solver_order": 3}], ids=str)
def test_a_model_that_diffusers_cannot_sample_alike_is_not_compared(setting, tmp_path, request, capsys):
    parts = tiny_parts()
    parts = parts._replace(defaults=dataclasses.replace(parts.defaults, **setting))
    folder.save_pipeline(tmp_path / "model", **parts._asdict())
    main = runpy.run_path(str(request.config.rootpath / "examples" / "public_checkpoint.py"))["main"]
    assert main([f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", "--steps=2"]) == 0
    out = capsys.readouterr().out
    assert "not compared with diffusers" in out and "export, loaded again: largest difference 0 of 255" in out


def test_a_model_that_is_not_there_is_one_line_and_writes_nothing(tmp_path, request, capsys):
    main = runpy.run_path(str(request.config.rootpath / "examples" / "public_checkpoint.py"))["main"]
    assert main(["--model=/nope", f"--out={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err == "public_checkpoint.py: error: there is no folder /nope.\n"
    assert not (tmp_path / "out").exists()


def test_a_changed_export_is_noticed(tmp_path, request, monkeypatch):
    """The comparison can fail: with a transformer whose output is negated in the export."""
    import jax

    from sana_jax.pipeline import SanaPipeline

    save = SanaPipeline.save_pretrained

    def save_mutated(pipe, path, dtype="float32"):
        proper = pipe.params
        head = jax.tree.map(lambda x: -x, proper["transformer"]["proj_out"])
        pipe.params = {**proper, "transformer": {**proper["transformer"], "proj_out": head}}
        save(pipe, path, dtype)
        pipe.params = proper

    monkeypatch.setattr(SanaPipeline, "save_pretrained", save_mutated)
    main = runpy.run_path(str(request.config.rootpath / "examples" / "public_checkpoint.py"))["main"]
    assert main([f"--out={tmp_path}", "--steps=2"]) == 1
