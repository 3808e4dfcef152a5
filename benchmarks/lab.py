"""A place to train a tiny autoencoder in, by `train.py` as a user would, and to look at what is left of its runs."""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
EVERY = 4  # steps between checkpoints

CONFIG = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import tiny_run

def get_config():
    config = tiny_run.config({data!r})
    config.optimizer.adamw_eps = 1e-2  # else Adam turns the rounding of a gradient near zero into a whole step
    return config
"""


class Job:
    """One training job; it can be started again and again in the same WORKDIR, as one process or as several."""

    def __init__(self, lab: "Lab", name: str, processes: int = 1, workdir: pathlib.Path | None = None):
        self._lab, self._count = lab, processes
        self.workdir = workdir or lab.folder / name
        self._logs = lab.folder / f"{name}.logs"
        self._logs.mkdir()
        self._starts = 0
        self.processes: list[subprocess.Popen] = []

    def start(
        self, *flags: str, steps: int | None = None, devices: int = 1, program: tuple[str, ...] = ("train.py",)
    ) -> None:
        """Starts all processes, with `devices` each; several share what they compile (tests/one_compiler)."""
        self._starts += 1
        common = [
            f"--config={self._lab.config}",
            f"--workdir={self.workdir}",
            f"--config.train.num_steps={steps or self._lab.steps}",
            f"--config.train.checkpoint_every={EVERY}",
            "--config.train.sample_every=0",
            *flags,
        ]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for number in range(self._count):
            own = []
            if self._count > 1:
                own += ["--config.mesh.multihost", f"--config.mesh.coordinator=127.0.0.1:{port}"]
                own += [f"--config.mesh.num_processes={self._count}", f"--config.mesh.process_id={number}"]
            with self._log(number).open("w") as log:
                command = [sys.executable, *program, *common, *own]
                environment = self._lab.environment | {"JAX_NUM_CPU_DEVICES": str(devices)}
                if self._count > 1:
                    environment["PYTHONPATH"] += os.pathsep + str(ROOT / "tests" / "one_compiler")
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            self.processes.append(process)

    def run(self, *flags: str, code: int = 0, **kwargs) -> None:
        """Starts it and waits for its end, which must be with this exit code."""
        self.start(*flags, **kwargs)
        self.expect(code)

    def take_up(self, other: "Job") -> None:
        """Copies what another run left, so that this one goes on from there."""
        shutil.copytree(other.workdir, self.workdir)

    def expect(self, *codes: int, timeout: float = 600) -> None:
        """Waits for the end of all processes, each of which must end with one of these exit codes."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            code = process.wait(max(0, deadline - time.monotonic()))
            assert code in codes, f"exit code {code}, not {codes}: {self.said()[-3000:]}"

    def wait_for(self, step: int) -> None:
        """Waits until a step is in the metrics."""
        while self.last_step() < step:
            assert all(process.poll() is None for process in self.processes), self.said()[-3000:]
            time.sleep(0.02)

    def is_saving(self, since: float) -> bool:
        """Whether there is an unfinished checkpoint that was begun after `since`, or the process was killed within it."""
        for path in (self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
            with contextlib.suppress(FileNotFoundError):  # finished meanwhile
                if path.stat().st_mtime > since:
                    return True
        return False

    def wait_for_saving(self, since: float) -> None:
        """Waits until a checkpoint is being written, or the run has ended."""
        while not self.is_saving(since) and self.processes[0].poll() is None:
            time.sleep(0.001)

    def signal(self, number: int, process: int = 0) -> None:
        """Sends one process a signal; SIGKILL is waited for."""
        self.processes[process].send_signal(number)
        if number == signal.SIGKILL:
            self.processes[process].wait()

    def said(self, process: int = 0) -> str:
        """What a process wrote to the terminal since the last start."""
        return self._log(process).read_text()

    def metrics(self) -> list[dict]:
        """The whole lines of metrics.jsonl that have a loss."""
        file = self.workdir / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [line for line in map(json.loads, (x for x in lines if x.endswith("\n"))) if "loss" in line]

    def last_step(self) -> int:
        """The last step in the metrics."""
        return max((line["step"] for line in self.metrics()), default=0)

    def curve(self) -> list[tuple]:
        """(step, loss, gradient norm) as they stand in the metrics."""
        return [(line["step"], line["loss"], line["grad_norm"]) for line in self.metrics()]

    def export(self) -> str:
        """SHA-256 of the exported weights."""
        (file,) = (self.workdir / "export" / "vae").glob("*.safetensors")
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def saved(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        folder = self.workdir / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())

    def newest(self) -> int:
        """The newest step that is saved; 0: none."""
        return max(self.saved(), default=0)

    def resumed(self) -> int | None:
        """The step from which it went on at the last start; None: it did not come so far."""
        found = re.search(r"resumed from step (\d+)", self.said())
        return int(found.group(1)) if found else None

    def check_resumed(self, newest: int) -> None:
        """Asserts that what was saved was gone on from."""
        assert self.resumed() in (newest or None, None), f"step {newest} was saved, resumed from {self.resumed()}"

    def check_equal(self) -> None:
        """Asserts that the run was, in the end, the one that nothing interrupted."""
        curve, whole = self.curve(), self._lab.whole(self._count)
        assert curve == whole.curve(), [pair for pair in zip(curve, whole.curve(), strict=False) if pair[0] != pair[1]][
            :3
        ]
        assert self.export() == whole.export()

    def _log(self, process: int) -> pathlib.Path:
        return self._logs / f"{self._starts}.{process}.txt"


class Lab:
    """A folder with a data set, a config, compiled programs and runs.

    Args:
      folder: empty.
      steps: of each run.
      seed: of the moments of the faults.
    """

    def __init__(self, folder: pathlib.Path, steps: int, seed: int = 0):
        sys.path.insert(0, str(ROOT / "tests"))
        import tiny_run

        self.folder, self.steps, self.random = folder, steps, random.Random(seed)
        self.data, self.config = folder / "data", folder / "config.py"
        tiny_run.write_pictures(self.data, 24)
        self.config.write_text(CONFIG.format(root=str(ROOT), data=str(self.data)))
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }

    @functools.cache  # noqa: B019 - there is one
    def begun(self) -> Job:
        """A run that ended early, with two checkpoints; for others to take up."""
        job = Job(self, "begun")
        job.run(steps=2 * EVERY)
        return job

    @functools.cache  # noqa: B019 - there are two or three of them
    def whole(self, processes: int) -> Job:
        """A run that nothing interrupts."""
        job = Job(self, f"whole-{processes}", processes)
        job.run()
        assert [step for step, *_ in job.curve()] == list(range(1, self.steps + 1))
        return job
