"""`python -m sana_jax.weights inspect`: what it says of a folder, and in one line what is wrong with it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import safetensors.numpy
from test_native import HEADS, TINY, state_dict, write
from tiny_pipeline import tiny_parts

from sana_jax.weights import folder, native, summary
from sana_jax.weights.__main__ import main
from sana_jax.weights.model_index import EMBEDDED_MODEL
from sana_jax.weights.stored import StoredTensor

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    folder.save_pipeline(path, **tiny_parts()._asdict())
    return path


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    def refuse(self, rows):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(StoredTensor, "__getitem__", refuse)


def inspect(path, capsys):
    code = main(["inspect", str(path)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_embedded_model_is_described(capsys):
    code, out, _ = inspect(EMBEDDED_MODEL, capsys)
    config = json.loads((EMBEDDED_MODEL / "transformer" / "config.json").read_text())
    assert code == 0
    assert "SANA" in out.splitlines()[0] and "(SanaPipeline, diffusers layout)" in out.splitlines()[0]
    assert f"{config['num_layers']} blocks" in out and "64x64 pixels" in out and "float16" in out


def test_families_and_public_sizes_are_named():
    presets = summary.presets
    names = {
        "SANA 0.6B": presets.sana_600m(),
        "SANA 1.6B": presets.sana_1600m(128),
        "SANA-1.5 4.8B": presets.sana15_4800m(),
        "SANA-Sprint 1.6B": presets.sprint_1600m(),
        "SANA, not of a public size": TINY,
    }
    for name, config in names.items():
        assert summary._family(config) == name


def test_a_pipeline_is_described_with_counts_files_and_settings(copy, capsys):
    vae = copy / "vae"
    shutil.copy(vae / "diffusion_pytorch_model.safetensors", vae / "diffusion_pytorch_model.fp16.safetensors")
    (copy / "sana_jax.json").unlink()
    code, out, err = inspect(copy, capsys)
    count = sum(x.size for x in safetensors.numpy.load_file(vae / "diffusion_pytorch_model.safetensors").values())
    assert (code, err) == (0, "")
    for expected in (
        f"vae: {count / 1e6:.1f} M parameters; stored as float32 {4 * count / 1e6:.1f} MB",
        "not used: diffusion_pytorch_model.fp16.safetensors",
        "clamp_fp16 off",
        "scheduler: flow_dpm, order 2, flow shift 3",
        "no sana_jax.json: those of the public models",
        "300 features; instruction before the prompt: the public one",
    ):
        assert expected in out, expected


def test_a_part_alone_and_its_variant_are_described(copy, capsys):
    part = copy / "transformer"
    (part / "diffusion_pytorch_model.safetensors").rename(part / "diffusion_pytorch_model.bf16.safetensors")
    code, out, _ = inspect(part, capsys)
    assert code == 0 and "transformer alone" in out and "(variant bf16)" in out


def test_an_index_whose_shards_were_not_fetched_is_not_said_to_come_first(copy, capsys):
    part, stem = copy / "transformer", "diffusion_pytorch_model"
    (part / f"{stem}.safetensors").rename(part / f"{stem}.bf16.safetensors")
    (part / f"{stem}.safetensors.index.json").write_text('{"weight_map": {"a": "missing.safetensors"}}')
    code, out, _ = inspect(part, capsys)
    assert code == 0 and "(variant bf16)" in out
    assert f"not used: {stem}.safetensors.index.json\n" in out


def test_a_training_runs_folder_is_described_by_its_export(copy, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    copy.rename(run / "export")
    for name in ("config.json", "run.json"):
        (run / name).write_text("{}")
    code, out, _ = inspect(run, capsys)
    assert code == 0 and out.startswith(f"{run / 'export'}: SANA")


def test_a_native_file_is_described(tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "x.pth", state_dict(TINY)[1])
    assert inspect(file, capsys)[0] == 2  # its number of heads is not known
    monkeypatch.setitem(native.CROSS_ATTENTION_HEADS, 64, HEADS["num_cross_attention_heads"])
    code, out, _ = inspect(file, capsys)
    assert code == 0 and "in the original code's layout" in out and "eps 1e-08 and 1e-06" in out


def test_what_is_wrong_is_said_in_one_line_with_exit_code_2(copy, tmp_path, capsys):
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    for break_it, message in (
        (lambda: file.write_bytes(whole[:-9]), f"{file} ({len(whole) - 9} bytes) is truncated or damaged"),
        (lambda: file.unlink(), "has no diffusion_pytorch_model.safetensors"),
        (lambda: (copy / "transformer" / "config.json").unlink(), "has no config.json"),
        (lambda: (copy / "model_index.json").unlink(), "has no model_index.json"),
        (lambda: (copy / "config.json").write_text("{}"), "has _class_name=None"),
    ):
        break_it()
        code, out, err = inspect(copy, capsys)
        assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("error: ") and message in err
    assert inspect(tmp_path / "nowhere", capsys)[0] == 2


def test_weights_that_do_not_fit_are_an_error(copy, capsys):
    config = copy / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    code, _, err = inspect(copy, capsys)
    assert code == 2 and "missing transformer_blocks.2." in err


def test_a_folder_without_its_tokenizer_is_an_error(copy, capsys):
    (copy / "tokenizer" / "tokenizer.json").unlink()
    code, _, err = inspect(copy, capsys)
    assert code == 2 and "tokenizer.json" in err


def test_the_command_wakes_no_device(written):
    script = (
        "import sys; from sana_jax.weights.__main__ import main; code = main(sys.argv[1:]); "
        "from jax._src import xla_bridge; sys.exit(code or len(xla_bridge._backends))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, "inspect", str(written)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
