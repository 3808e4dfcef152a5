"""examples/public_checkpoint.py, on the embedded model and with diffusers."""

import runpy

import pytest

pytestmark = pytest.mark.parity
pytest.importorskip("torch")
pytest.importorskip("diffusers")


def test_the_export_gives_the_same_picture_here_and_in_diffusers(tmp_path, request, capsys):
    main = runpy.run_path(str(request.config.rootpath / "examples" / "public_checkpoint.py"))["main"]
    assert main([f"--out={tmp_path}", "--steps=4"]) == 0
    out = capsys.readouterr().out
    assert (
        "export, in diffusers: largest difference" in out and "export, loaded again: largest difference 0 of 255" in out
    )
    assert (tmp_path / "sana_jax.png").is_file() and (tmp_path / "diffusers.png").is_file()


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
