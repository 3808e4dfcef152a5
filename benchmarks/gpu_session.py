"""Everything that waits for a GPU: what a session that is lent one runs at once.

    python benchmarks/gpu_session.py all --out=DIR --minutes=9   # of the parts below all that fits, see gpu_all.py
    python benchmarks/gpu_session.py pictures --out=DIR   # prompt to pixels beside diffusers, see gpu_pictures.py
    python benchmarks/gpu_session.py layers --out=DIR     # layers and a training step beside PyTorch, see gpu_layers.py
    python benchmarks/gpu_session.py tune --out=DIR       # kernels with other tiles and grids, see gpu_tuning.py
    python benchmarks/gpu_session.py profile --out=DIR    # where a picture's time goes, kernel by kernel, see gpu_profile.py
    python benchmarks/gpu_session.py time --out=DIR       # public sizes, random weights: forward, decode, step, picture
    python benchmarks/gpu_session.py check --out=DIR      # the tests marked `gpu`
    python benchmarks/gpu_session.py train --out=DIR --minutes=8 --config=configs/emoji_autoencoder_128.py
    python benchmarks/gpu_session.py train --out=DIR --minutes=8 --config=configs/emoji_128.py --from_parts=DIR2

The parts stand in the order of their worth; each is one command, and `--only` and `--turns` cut it to the time there is. On an H200
with 16 cores a profile of one picture of 1.6B took 95 s, of which 73 were compilation, `layers` of ours 40 s, `check` 55 s, the
first picture of torch.compile 50 s; a call of 16 pictures was not compiled after 170 s beside another process. `--tiny` shrinks every
model, so that the whole script can be tried on a CPU first. Each part writes DIR/PART.json with device, versions and commit, after
every measurement, so that what was measured before a time limit is kept.

A machine without a network is given wheels of what it lacks: here `pip download --only-binary=:all: --python-version=3.12 -d .whl
grain array_record ml_collections diffusers ...`, there `pip install --no-index --find-links=.whl ...`.

A training leg ends by itself before `--minutes` and leaves DIR/export.tar.partN of at most 15 MiB, the averaged weights in
diffusers layout with config and metrics; `--from_parts` names the folder of an earlier leg's parts to go on from, whose
weights start this leg (`init_from`), or whose autoencoder it uses.
"""

import argparse
import importlib.util
import io
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import tarfile
import time

import gpu_all
import gpu_layers
import gpu_models
import gpu_pictures
import gpu_profile
import gpu_tuning
from provenance import ROOT, commit, versions

PART_BYTES = 15 * 2**20
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("part", choices=("all", "pictures", "layers", "tune", "profile", "time", "check", "train"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script on a CPU")
    parser.add_argument(
        "--only", default="", type=expression, help="rows of pictures, layers, tune and profile that match"
    )
    parser.add_argument("--turns", default="peer,ours,peer", type=turns, help="of pictures and layers, in their order")
    parser.add_argument("--commit", help="where git does not know it")
    parser.add_argument("--minutes", type=minutes, default=8.0, help="of `all`, or of a training leg with compilation")
    parser.add_argument("--config", default="configs/emoji_128.py", help="of a training leg")
    parser.add_argument("--from_parts", type=pathlib.Path, help="folder with an earlier leg's export.tar.part*")
    parser.add_argument("overrides", nargs="*", help="of a training leg, after --: --config.FIELD=VALUE")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the tests and train.py run beside this process
    if arguments.part == "profile":
        gpu_profile.keep_programs()
    report = Report(arguments.out / f"{arguments.part}.json", arguments.commit or commit())
    parts = {
        "all": everything,
        "pictures": pictures,
        "layers": layers,
        "tune": tune,
        "profile": profile,
        "time": ceilings_and_models,
        "check": check,
        "train": train,
    }
    code = parts[arguments.part](arguments, report)
    if not report.has_rows:
        print(f"gpu_session.py: --only={arguments.only} matches the name of no row", file=sys.stderr)
        return 2
    return code


def expression(text: str) -> str:
    """The text, if it is a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def minutes(text: str) -> float:
    """A positive number."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time; give minutes above 0")
    return float(text)


def turns(text: str) -> list[str]:
    """The turns, separated by commas."""
    found = text.split(",")
    if not set(found) <= {"peer", "ours"}:
        raise argparse.ArgumentTypeError(f"{text!r} names others than peer and ours, as in peer,ours,peer")
    return found


class Report:
    """Rows of results, written to a JSON file whenever one is added."""

    def __init__(self, file: pathlib.Path, commit: str):
        import jax

        self.commit = commit
        self._file = file
        self._content = {
            "command": " ".join(["python", *sys.argv]),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "python": platform.python_version(),
            "versions": versions(*PACKAGES),
            "commit": commit,
            "rows": [],
        }

    @property
    def has_rows(self) -> bool:
        return bool(self._content["rows"])

    def add(self, **row):
        self._content["rows"].append(row)
        whole = self._file.with_suffix(".new")
        whole.write_text(json.dumps(self._content, indent=1) + "\n")
        whole.replace(self._file)
        print(json.dumps(row), flush=True)


def everything(arguments, report) -> int:
    gpu_all.measure(report, arguments.out, arguments.minutes, arguments.tiny)
    return 0


# Check


def check(arguments, report) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    began = time.perf_counter()
    environment = os.environ | {"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": ""}  # in place of what tests/conftest.py sets
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(run.stdout[-6000:], run.stderr[-2000:])
    last = (run.stdout.strip().splitlines() or ["nothing printed"])[-1]
    report.add(name="pytest -m gpu", exit_code=run.returncode, summary=last, seconds=time.perf_counter() - began)
    return run.returncode


# Beside PyTorch


def pictures(arguments, report) -> int:
    return in_turn(gpu_pictures, arguments, report)


def layers(arguments, report) -> int:
    gpu_models.measure_ceilings(report, arguments.tiny, arguments.only)
    return in_turn(gpu_layers, arguments, report)


def tune(arguments, report) -> int:
    gpu_tuning.measure(report, arguments.tiny, arguments.only)
    return 0


def profile(arguments, report) -> int:
    gpu_profile.measure(report, arguments.out, arguments.tiny, arguments.only)
    return 0


def ceilings_and_models(arguments, report) -> int:
    gpu_models.measure_ceilings(report, arguments.tiny)
    gpu_models.measure_all(report, arguments.tiny)
    return 0


def in_turn(module, arguments, report) -> int:
    """The peer, ours, the peer again: what changes between its two turns is the machine's doing."""
    peer = importlib.util.find_spec("diffusers") is not None and importlib.util.find_spec("torch") is not None
    if not peer:
        report.add(name="diffusers", error="torch or diffusers is not installed: no peer")
    for turn in arguments.turns:
        if turn == "ours":
            module.measure_ours(report, arguments.tiny, arguments.only)
        elif peer:
            gpu_pictures.measure_peers(report, arguments.tiny, arguments.only, module.__file__)
    return 0


# Train


def train(arguments, report) -> int:
    """One leg of train.py, ended by SIGTERM in time to save."""
    began, workdir = time.perf_counter(), arguments.out / "run"
    command = [sys.executable, "train.py", f"--config={arguments.config}", f"--workdir={workdir}"]
    command += ["--config.train.export_dtype=float16", *arguments.overrides]
    if arguments.from_parts:
        earlier = unpack(arguments.from_parts, arguments.out / "earlier")
        continued = (earlier / "transformer").is_dir() or "autoencoder" in arguments.config
        command.append(f"--config.{'init_from' if continued else 'autoencoder_path'}={earlier}")
        if continued and (earlier / "transformer").is_dir():
            command.append(f"--config.autoencoder_path={earlier}")
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        process.wait(timeout=60 * arguments.minutes - 45)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    parts = pack(workdir, arguments.out)
    seconds = time.perf_counter() - began
    report.add(name="training leg", exit_code=process.returncode, seconds=seconds, parts=parts, last=metrics[-1])
    return process.returncode


def pack(workdir: pathlib.Path, out: pathlib.Path) -> int:
    """The export with config, metrics and the last samples, in files small enough to be copied; returns their number."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(workdir / "export", arcname="export")
        for name in ("config.json", "metrics.jsonl"):
            tar.add(workdir / name, arcname=f"export/training/{name}")
        for picture in sorted((workdir / "samples").glob("*.png"))[-1:]:
            tar.add(picture, arcname="export/training/heldout.png")
    data = buffer.getvalue()
    starts = range(0, len(data), PART_BYTES)
    for number, start in enumerate(starts):
        (out / f"export.tar.part{number}").write_bytes(data[start : start + PART_BYTES])
    return len(starts)


def unpack(parts: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The `export` folder out of the parts of an earlier leg."""
    files = sorted(parts.glob("export.tar.part*"), key=lambda file: int(file.suffix.removeprefix(".part")))
    if not files:
        raise FileNotFoundError(f"--from_parts={parts} holds no export.tar.part*; give the --out of an earlier leg")
    with tarfile.open(fileobj=io.BytesIO(b"".join(file.read_bytes() for file in files))) as tar:
        tar.extractall(folder, filter="data")
    return folder / "export"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
