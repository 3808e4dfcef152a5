"""train.py from the command line: what is wrong is said in one line, before anything is written."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run_script(*args):
    return subprocess.run(
        [sys.executable, "train.py", *args], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--config=configs/emoji.py", "--workdir=unused", "--config.train.num_step=3"],
            "train.py: there is no field config.train.num_step; did you mean config.train.num_steps?",
        ),
        (
            ["--config=configs/emoji.py", "--workdir=unused", "--config.trian.num_steps=3"],
            "train.py: there is no field config.trian.num_steps; did you mean config.train?",
        ),
        (
            ["--config=configs/emoji.py", "--workdir=unused", "--num_steps=3"],
            "train.py: there is no flag --num_steps; did you mean --config.train.num_steps?",
        ),
        (
            ["--config=configs/emoji.py", "--workdir=unused", "--learning_rate=3"],
            "train.py: there is no flag --learning_rate; did you mean --config.optimizer.learning_rate?",
        ),
        (["--config=configs/emoji.py"], "train.py: --workdir is missing"),
        (
            ["--config=configs/emoji.py", "--workdir=x", "--aot_show"],
            "train.py: --aot_show says what --aot does beside",
        ),
        (
            ["--config=configs/emoji.py", "--aot=v5e:2x2", "--aot_json=README.md/aot.json"],
            "train.py: --aot_json=README.md/aot.json cannot be written: ",
        ),
        (
            ["--config=configs/emoji.py", "--workdir=gs://bucket/run"],
            "train.py: --workdir=gs://bucket/run is no folder",
        ),
        (
            ["--config=configs/emoji.py", "--workdir=README.md/run"],
            "train.py: --workdir=README.md/run cannot be written to: ",
        ),
        (["--config=configs/emojy.py", "--workdir=unused"], "train.py: --config=configs/emojy.py: no such file"),
        (["--config=configs/emoji.py", "--workdri=unused"], "train.py: Unknown command line flag 'workdri'"),
        (
            ["--config=configs/emoji.py", "--workdir=unused", "--config.train.num_steps=many"],
            "train.py: flag --config.train.num_steps=many",
        ),
        (
            ["--config=configs/emoji.py", "--workdir=unused", "--config.train.num_steps=None"],
            "train.py: --config.train.num_steps=None: the field is not optional",
        ),
        (
            ["--config=configs/emoji.py", "--workdir=unused", "--config.model.interpolation_scal=None"],
            "train.py: there is no field config.model.interpolation_scal; did you mean config.model.interpolation_scale?",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(args, message):
    result = run_script(*args)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == 1
    assert not (ROOT / "unused").exists()


def test_optional_fields_become_none_and_numbers_on_the_command_line():
    fields = (
        "text_encoder.model.attn_logit_softcap",
        "model.interpolation_scale",
        "text_encoder.model.rope_local_theta",
    )
    shown = ", ".join(f"train._CONFIG.value.{field}" for field in fields)
    script = f"import sys, train; train.parse_flags(sys.argv); print({shown})"
    values = (f"--config.{field}={value}" for field, value in zip(fields, ("None", "None", "100"), strict=True))
    args = [sys.executable, "-c", script, "--config=configs/emoji.py", "--workdir=unused", *values]
    result = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.stdout.split() == ["None", "None", "100.0"], result.stderr


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            "--config.model.attention_implementation=pallas_gpu",
            "train.py: config.model.attention_implementation='pallas_gpu' runs on a GPU, and this run's devices are of platform "
            "'cpu'. Use 'auto'.",
        ),
        (
            "--config.optimizer.name=adamx",
            "train.py: optimizer.name='adamx' is not one of adamw, adamw8bit, came, came8bit, muon.",
        ),
        (
            "--config.mesh.multihost=True",
            "train.py: mesh.multihost=True, and JAX finds no other processes from here (coordinator_address should be defined.) "
            "Give mesh.coordinator, mesh.num_processes and mesh.process_id, or use mesh.multihost=False.",
        ),
    ],
)
def test_what_only_the_run_can_refuse_is_one_line_and_writes_nothing(tmp_path, choice, message):
    result = run_script("--config=configs/emoji.py", f"--workdir={tmp_path / 'run'}", choice)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == message
    assert not (tmp_path / "run").exists()
