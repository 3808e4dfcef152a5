"""All that waits for a GPU in one command of at most `--minutes`, for `gpu_session.py all`: for a card that is lent once.

First every program is compiled, by processes beside each other, while the tests run; what they time is dropped. Then everything is timed,
one after the other, most valuable first, with programs out of JAX's and PyTorch's caches on disk, until the time is up.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple, TextIO

SESSION = pathlib.Path(__file__).with_name("gpu_session.py")
MODEL = "1.6B 1024"
COMPILED_FIRST = (
    ("check",),
    ("pictures", "--turns=ours", f"--only=sana_jax: {MODEL}, 1 picture, bf16$"),
    ("pictures", "--turns=ours", f"--only=sana_jax: {MODEL}, 1 picture, bf16 and"),
    ("pictures", "--turns=peer", f"--only=diffusers torch.compile: {MODEL}, 1 picture"),
    ("pictures", "--turns=ours", f"--only=sana_jax: {MODEL}, 16 pictures, bf16$"),
    ("pictures", "--turns=ours", f"--only=sana_jax: {MODEL}, 16 pictures, bf16 and"),
)
TIMED = (
    ("pictures", "--turns=peer,ours,peer", f"--only={MODEL}, 1 picture, bf16"),
    ("layers", "--turns=ours", "--only=matrix|read and|Mix-FFN|stacked"),
    ("pictures", "--turns=ours,peer", f"--only={MODEL}, 16 pictures, bf16"),
    ("tune", "--only=forward,"),
    ("profile", f"--only={MODEL}, 1 picture"),
    ("layers", "--turns=ours,peer", f"--only=(sana_jax|torch.compile): training step of {MODEL.replace(' ', ' at ')}"),
    ("layers", "--turns=peer", "--only=torch.compile: (linear|Mix)"),
    ("layers", "--turns=ours,peer", "--only=(sana_jax|torch.compile): training step of 0.6B"),
    ("pictures", "--turns=ours", f"--only={MODEL}, 1 picture, (fp8|int8)"),
)
COMPILING = 0.45  # of the time at most
LAST_START = 20.0  # seconds before the end


class _Started(NamedTuple):
    """A command: its words, the report that it writes, its process, what that prints, and when it began."""

    command: tuple[str, ...]
    report: pathlib.Path
    process: subprocess.Popen
    printed: TextIO
    began: float


def measure(report, out: pathlib.Path, minutes: float, tiny: bool) -> None:
    """Adds the rows of all that was timed, and the seconds and exit code of every command."""
    end = time.monotonic() + 60 * minutes
    (out / "profile.json").unlink(missing_ok=True)  # of an earlier run
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch",
        }

        def start(number: int, command: tuple[str, ...]) -> _Started:
            place = out if command[0] == "profile" else pathlib.Path(folder, str(number))
            words = [sys.executable, str(SESSION), *command, f"--out={place}", f"--commit={report.commit}"]
            printed = open(f"{folder}/{number}.txt", "w+")
            options = {"stdout": printed, "stderr": subprocess.STDOUT, "start_new_session": True, "env": environment}
            process = subprocess.Popen([*words, *["--tiny"] * tiny], **options)
            stack.callback(_end, process)
            return _Started(command, place / f"{command[0]}.json", process, printed, time.monotonic())

        commands = [_shrunk(command) for command in COMPILED_FIRST] if tiny else COMPILED_FIRST
        started = [start(number, command) for number, command in enumerate(commands)]
        until = time.monotonic() + COMPILING * 60 * minutes
        for each in started:
            _finish(each, until, report, rows=each.command == ("check",))
        for number, command in enumerate(map(_shrunk, TIMED) if tiny else TIMED, len(commands)):
            if time.monotonic() > end - LAST_START:
                report.add(name=f"no time: {' '.join(command)}")
            else:
                _finish(start(number, command), end, report, rows=True)


def _shrunk(command: tuple[str, ...]) -> tuple[str, ...]:
    """A command whose model is the tiny one."""
    part, *options = command
    return part, *(option.split("=")[0] + "=." if "1.6B" in option else option for option in options)


def _finish(started: _Started, until: float, report, rows: bool) -> None:
    """Waits for a command, or ends it and what it started when the time comes, and reports how it went, after its own rows."""
    try:
        started.process.wait(timeout=max(until - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        _end(started.process)
    seconds = time.monotonic() - started.began
    started.printed.seek(0)
    lines = started.printed.read().splitlines()
    started.printed.close()
    if rows and started.report.is_file():
        for row in json.loads(started.report.read_text())["rows"]:
            report.add(**row)
    code = started.process.returncode
    last = {"output": "\n".join(lines[-30:])[-3000:]} if code else {}
    report.add(
        name=f"{'command' if rows else 'compiled'}: {' '.join(started.command)}",
        exit_code=code,
        seconds=seconds,
        **last,
    )


def _end(process: subprocess.Popen) -> None:
    """Ends it, if it still runs, and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
