"""The launch recipes parse, and what they ask of train.py exists. (What was run is said in their headers.)"""

import pathlib
import re
import subprocess

import pytest
import yaml

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
    assert "--config.mesh.multihost=True" in text
    for field in fields:
        section = config
        for part in field.split("."):
            assert part in section, field
            section = section[part]


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
    # A mistake in the config (exit code 2) fails the job at once; everything else starts all pods again.
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert spec["failurePolicy"]["maxRestarts"] > 0
