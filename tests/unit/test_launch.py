"""The launch recipes parse, and what they ask of train.py exists. (What was run is said in their headers.)"""

import pathlib
import re
import runpy
import subprocess

import pytest
import yaml
from ml_collections import ConfigDict

from configs import base

FOLDER = pathlib.Path(__file__).parents[2] / "launch"
FILES = sorted(path for path in FOLDER.iterdir())


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix != ".yaml"], ids=lambda path: path.name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_config_file_and_field_named_in_a_recipe_exists(path):
    text, config = path.read_text(), base.get_config()
    for name in re.findall(r"--config=(configs/\S+\.py)", text):
        assert (FOLDER.parent / name).is_file(), name
    fields = set(re.findall(r"--config\.([a-z_.]+)=", text))
    assert "--config.mesh.multihost=True" in text or path.name in (
        "keep_going.sh",
        "newest_checkpoint.sh",
    )  # of one process
    for field in fields:
        section = config
        for part in field.split("."):
            assert part in section, field
            section = section[part]


def relative_paths(section, name="config"):
    """Names of a config's fields that are paths from the folder in which train.py starts."""
    for field, value in section.items():
        if isinstance(value, ConfigDict):
            yield from relative_paths(value, f"{name}.{field}")
        elif isinstance(value, str) and "/" in value and not value.startswith("/"):
            yield f"{name}.{field}"


@pytest.mark.parametrize("recipe", ["gke_jobset.yaml", "tpu_vm.sh"])
def test_every_path_of_the_config_is_given_where_a_recipe_brings_the_repository_alone(recipe):
    _, *commands = (FOLDER / recipe).read_text().split("--config=")
    assert commands
    for command in commands:
        fields = list(relative_paths(runpy.run_path(FOLDER.parent / command.split()[0])["get_config"]()))
        assert len(fields) == 3
        assert [field for field in fields if f"--{field}=/" not in command] == []


def test_a_start_on_tpu_vms_keeps_the_log_of_the_one_before():
    assert " >>train.log" in (FOLDER / "tpu_vm.sh").read_text()


def test_a_recipe_says_what_was_run():
    for path in FILES:
        assert re.search(r"^# (Not run|Run in .* 20\d\d)", path.read_text(), re.MULTILINE), path.name


def test_the_jobset_starts_one_pod_for_every_host_of_its_topology():
    spec = yaml.safe_load((FOLDER / "gke_jobset.yaml").read_text())["spec"]
    (job,) = spec["replicatedJobs"]
    job = job["template"]["spec"]
    pod = job["template"]["spec"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    (container,) = pod["containers"]
    assert job["completions"] == job["parallelism"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0


def final_codes():
    """Exit codes of which train.py's header says that they would come again."""
    (line,) = re.findall(r"^(.*) would come again", (FOLDER.parent / "train.py").read_text(), re.MULTILINE)
    return [int(code) for code in re.findall(r"\d+", line)]


def test_the_jobset_ends_at_the_exit_codes_that_would_come_again_and_restarts_after_all_others():
    spec = yaml.safe_load((FOLDER / "gke_jobset.yaml").read_text())["spec"]
    (rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": final_codes()}}
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert spec["failurePolicy"]["maxRestarts"] > 0


def end_on_slurm(code, folder, workdir, restarts=1):
    """Whether the job of a train.py that ended with `code` is queued again."""
    for name, script in {"srun": f"exit {code}", "scontrol": "echo called: scontrol $*"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    command = ["bash", FOLDER / "slurm_gpu.sbatch", "--config=c.py", f"--workdir={workdir}", "--config.seed=1"]
    done = subprocess.run(command, env=environment, cwd=FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == code and not done.stderr
    queued = "called: scontrol requeue 7" in done.stdout
    assert ("not queued again" in done.stdout) == (not queued and code not in (0, *final_codes()))
    return queued


@pytest.mark.parametrize("code", [0, 1, 2, 70, 73, 74, 75, 76, 134])
def test_slurm_queues_a_job_again_but_at_the_exit_codes_that_would_come_again(code, tmp_path):
    assert end_on_slurm(code, tmp_path, tmp_path / "a run") == (code not in (0, *final_codes()))


def test_slurm_gives_up_a_job_that_gets_no_further(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [end_on_slurm(1, tmp_path, tmp_path / "run") for _ in range(4)] == [True, True, True, False]
    for step in (900, 1000):  # not in the order of their names
        (checkpoints / str(step)).mkdir(parents=True)
        assert [end_on_slurm(76, tmp_path, tmp_path / "run") for _ in range(4)] == [True, True, True, False]
    (checkpoints / "1100.unreadable-1700000000").mkdir()
    assert not end_on_slurm(134, tmp_path, tmp_path / "run")
    assert end_on_slurm(75, tmp_path, tmp_path / "run") and end_on_slurm(73, tmp_path, tmp_path / "run")


def test_what_an_earlier_job_of_slurm_gave_up_may_be_tried_again(tmp_path):
    assert [end_on_slurm(76, tmp_path, tmp_path / "run") for _ in range(4)] == [True, True, True, False]
    assert [end_on_slurm(76, tmp_path, tmp_path / "run", restarts) for restarts in range(4)] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("script", ["slurm_gpu.sbatch", "keep_going.sh"])
def test_without_a_folder_to_look_into_nothing_is_started(script, tmp_path):
    command = ["bash", FOLDER / script, "--config=c.py", "--workdir", "run"]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "give --workdir=FOLDER, with =" in done.stderr and not done.stdout


def keep_going(folder, codes):
    """Ends of a train.py that leaves a checkpoint where its code is negative; (what the script ends with, how many starts)."""
    (folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    python = folder / ".venv" / "bin" / "python"
    python.write_text(
        """#!/bin/bash
read -r code <codes; sed -i 1d codes; echo "$*" >>starts
if ((code < 0)); then mkdir -p run/checkpoints/$(wc -l <starts); fi
exit ${code#-}
"""
    )
    python.chmod(0o755)
    (folder / "starts").write_text("")
    command = ["bash", FOLDER / "keep_going.sh", "--config=a b.py", "--workdir=run"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    starts = (folder / "starts").read_text().splitlines()
    assert set(starts) == {"train.py --config=a b.py --workdir=run"} and not done.stderr
    return done.returncode, len(starts)


@pytest.mark.parametrize("code", [0, *final_codes(), 75, 130, 143])
def test_a_run_that_ends_for_good_is_not_started_again(code, tmp_path):
    assert keep_going(tmp_path, [1, -73, 76, 134, code, 1]) == (code, 5)


def test_a_run_is_started_again_as_long_as_it_gets_further(tmp_path):
    assert keep_going(tmp_path, [137, 1, 1, 1, 1]) == (1, 4)
    assert keep_going(tmp_path, [-1] * 9 + [76, 76, 76, 0]) == (76, 12)
