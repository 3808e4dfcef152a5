"""What a GPU's kernels take with other tiles and grids, for `gpu_session.py tune`: the constants of their modules, changed.

A row a kernel, shape, pass and setting, bfloat16; the first setting of a kernel is the one that is committed. A program calls the
kernel eight times on arrays of their own, so that neither the host nor the card's cache counts. Compiling takes far longer than
running: as many processes as half of the cores compile at once, and then run one after the other.
"""

import argparse
import fcntl
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import gpu_layers
import gpu_models

CALLS = 8  # in a program
LINEAR_ATTENTION, MIX_FFN = "linear_attention", "glu_mbconv"
# Package -> constants of its module pallas_gpu, and their values.
SETTINGS = {
    LINEAR_ATTENTION: (("BLOCKS", "BUFFERS"), [(132, 4), *itertools.product((132, 264, 528, 1056), (2, 3))]),
    MIX_FFN: (("ROWS", "COLUMNS"), [(8, 8), (4, 8), (16, 8), (8, 16), (4, 16)]),
}
# Batch, and side of the tokens' grid: a picture with its guidance, many pictures, one of 4096 px.
GRIDS = ((2, 32), (16, 32), (1, 128))


class Case(NamedTuple):
    """A row.

    Attributes:
      package: of kernels/.
      grid: batch and side.
      backward: whether the derivative is taken too.
      setting: values of the package's constants.
    """

    package: str
    grid: tuple[int, int]
    backward: bool
    setting: tuple[int, int]

    def __str__(self):
        names, _ = SETTINGS[self.package]
        setting = " ".join(f"{name}={value}" for name, value in zip(names, self.setting, strict=True))
        passes = "forward and backward" if self.backward else "forward"
        return f"{self.package}, {self.grid[0]} x {self.grid[1]}x{self.grid[1]} tokens, {passes}, {setting}"


def cases(tiny: bool, only: str) -> list[Case]:
    grids = ((1, 8),) if tiny else GRIDS
    found = [
        Case(package, grid, backward, setting)
        for package, (_, settings) in SETTINGS.items()
        for grid, backward, setting in itertools.product(grids, (False, True), settings)
    ]
    return [case for case in found if re.search(only, str(case))]


def measure(report, tiny: bool, only: str) -> None:
    """All cases that match, shared by processes."""
    workers = min(len(cases(tiny, only)), max(os.cpu_count() // 2, 1))
    with tempfile.NamedTemporaryFile() as lock:
        command = [sys.executable, __file__, f"--only={only}", f"--lock={lock.name}", *["--tiny"] * tiny]
        reading, writing = os.pipe()  # of all, so that a row is reported when it is there
        started = [
            subprocess.Popen([*command, f"--first={each}", f"--step={workers}"], stdout=writing)
            for each in range(workers)
        ]
        os.close(writing)
        with open(reading) as lines:
            for line in lines:
                if line.startswith("{"):
                    report.add(**json.loads(line))
        for process in started:
            if process.wait():
                report.add(name="tune", error=f"exit code {process.returncode}; see the output")


def _rows(own: list[Case], lock: str, tiny: bool) -> Iterator[dict]:
    """Compiles every case, then waits for its turn and times them; an error is a row too."""
    compiled = []
    for case in own:
        try:
            compiled.append((case, *_compile(case, tiny)))
        except Exception as error:  # noqa: BLE001 - reported as the result
            yield {"name": str(case), "error": f"{type(error).__name__}: {error}"[:1000]}
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for case, run, inputs, least_bytes in compiled:
            try:
                seconds = _seconds(run, inputs)
            except Exception as error:  # noqa: BLE001 - reported as the result
                yield {"name": str(case), "error": f"{type(error).__name__}: {error}"[:1000]}
                continue
            yield {"name": str(case), "seconds": seconds, "gigabytes_per_second": least_bytes / seconds / 1e9}


def _compile(case: Case, tiny: bool) -> tuple:
    """The program of all calls, a function that makes its inputs, and the bytes that a call moves at least."""
    import importlib

    import jax
    import jax.numpy as jnp

    jax.clear_caches()  # of what was traced with another setting
    module = importlib.import_module(f"sana_jax.kernels.{case.package}.pallas_gpu")
    for name, value in zip(SETTINGS[case.package][0], case.setting, strict=True):
        setattr(module, name, value)
    batch, side = case.grid
    width = 64 if tiny else gpu_layers.WIDTH
    layer, parts = {LINEAR_ATTENTION: (gpu_layers.STACKED, 3), MIX_FFN: (gpu_layers.MIDDLE, 2)}[case.package]
    shape = (batch, side * side, width) if parts == 3 else (batch, side, side, int(gpu_layers.RATIO * width))
    # Tried on a CPU, the script runs without the kernels.
    forward = gpu_layers.our_form("xla" if tiny else "pallas_gpu", layer, shape)

    def call(x, g):
        return gpu_layers.both_passes(forward)(g, x) if case.backward else forward(x)

    @jax.jit
    def inputs():
        keys = jax.random.split(jax.random.key(0), (CALLS, 2))
        sizes = (*shape[:-1], parts * shape[-1]), shape
        return [
            [jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(pair, sizes, strict=True)] for pair in keys
        ]

    run = jax.jit(lambda arrays: [call(x, g) for x, g in arrays]).lower(jax.eval_shape(inputs)).compile()
    return run, inputs, gpu_layers.least_bytes(layer, shape, case.backward)


def _seconds(run, make) -> float:
    import jax

    inputs = make()
    jax.block_until_ready(run(inputs))
    return gpu_models.median_of_queues(functools.partial(run, inputs), jax.block_until_ready) / CALLS


def _worker() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--lock", required=True)
    parser.add_argument("--first", type=int, required=True, help="of the cases of this process")
    parser.add_argument("--step", type=int, required=True)
    arguments = parser.parse_args()
    own = cases(arguments.tiny, arguments.only)[arguments.first :: arguments.step]
    for row in _rows(own, arguments.lock, arguments.tiny):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    _worker()
