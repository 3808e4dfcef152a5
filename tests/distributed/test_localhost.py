"""launch/localhost.sh runs a job of two processes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny_run
from processes import ONE_COMPILER

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
    "--config.model.num_layers=1",
    "--config.model.unroll=1",
    "--config.text_encoder.model.num_layers=1",
    "--config.text_encoder.model.unroll=1",
    "--config.data.batch_size=8",
    "--config.train.num_steps=2",
    "--config.train.log_every=1",
    "--config.train.sample_every=2",
    "--config.sample.num_images=4",
    "--config.sample.num_inference_steps=2",
    "--config.sample.split=all",
    "--config.data.split=all",
]


def localhost(*args):
    environment = os.environ | {
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DEVICES": "2",
        "PYTHONPATH": str(ONE_COMPILER),
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the time
    }
    del environment["JAX_COMPILATION_CACHE_DIR"]  # of the tests: the run has its own
    command = [ROOT / "launch" / "localhost.sh", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


def test_two_processes_with_two_devices_train_log_once_and_draw(tmp_path):
    tiny_run.write_pictures(tmp_path / "pictures", 24)
    result = localhost(
        "2",
        "--config=configs/emoji.py",
        f"--workdir={tmp_path}/run",
        f"--config.data.path={tmp_path}/pictures",
        "--config.train.accumulate_steps=2",
        *TINY,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "[0] " in result.stderr and "[1] " in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    startup = next(line for line in lines if "startup/compile" in line)
    assert startup["startup/imports"] > 0 and startup["startup/join"] > 0
    assert (tmp_path / "run" / "samples" / "step_00000002.png").is_file()
    assert list((tmp_path / "run" / "compilation_cache").glob("jit_step-*"))


def test_a_mistake_in_the_config_is_told_by_every_process_with_exit_code_2(tmp_path):
    result = localhost("2", "--config=configs/emoji.py", f"--workdir={tmp_path}", "--config.data.batch_size=6")
    assert result.returncode == 2
    assert result.stderr.count("data.batch_size=6 is not a multiple of") == 2
