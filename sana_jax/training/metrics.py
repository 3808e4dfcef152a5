"""Measurements of a run: the means between two logs, where they are written, and the line that a person reads."""

import json
import math
import pathlib
import time
from collections.abc import Mapping

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from sana_jax import atomic


class NonFiniteError(RuntimeError):
    """A metric became infinite or not a number."""


class MetricWindow:
    """Metrics of the steps since the last log, left on the device until they are asked for.

    Fetching waits for the step it belongs to. The loop asks for all but the newest, so that a step is always in flight
    while the host looks at the numbers of those before.
    """

    def __init__(self):
        self._pending: list[tuple[int, Mapping[str, jax.Array]]] = []

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Keeps the metrics of update number `step` (counted from 1)."""
        self._pending.append((step, metrics))

    def take(self, last: int) -> tuple[int, dict[str, float]]:
        """Number of steps up to and including `last`, and their mean metrics.

        Raises:
          NonFiniteError: a metric of one of these steps is not finite; names the metric and the steps.
        """
        taken = [(step, metrics) for step, metrics in self._pending if step <= last]
        self._pending = [(step, metrics) for step, metrics in self._pending if step > last]
        if not taken:
            return 0, {}
        values = jax.device_get([metrics for _, metrics in taken])
        means = {name: float(np.mean([v[name] for v in values], dtype=np.float64)) for name in values[0]}
        for name, mean in means.items():
            if not math.isfinite(mean):
                bad = next(step for (step, _), v in zip(taken, values, strict=True) if not np.isfinite(v[name]))
                raise NonFiniteError(
                    f"{name} became {mean} within steps [{taken[0][0]}, {taken[-1][0]}], first at step {bad}. Start "
                    f"a new run from the last export (config.init_from) with a smaller optimizer.learning_rate."
                )
        return len(taken), means


class MetricWriter:
    """WORKDIR/metrics.jsonl (one object a line) and TensorBoard events; silent on all processes but the first.

    A run that goes on from `first_step` writes the steps after it anew: what an earlier process wrote of them goes, so that
    each step is there once.
    """

    def __init__(self, workdir: str | pathlib.Path, first_step: int, enabled: bool):
        self._enabled = enabled
        if enabled:
            folder = pathlib.Path(workdir)
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = folder
            drop_lines_after(folder / "metrics.jsonl", first_step)
            self._jsonl = (folder / "metrics.jsonl").open("a", buffering=1)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of one step."""
        if self._enabled:
            self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def pictures(self, step: int, grid: np.ndarray) -> None:
        """Writes a uint8 picture [H, W, 3] as samples/step_STEP.png and to TensorBoard."""
        if self._enabled:
            folder = self._folder / "samples"
            folder.mkdir(exist_ok=True)
            Image.fromarray(grid).save(folder / f"step_{step:08d}.png")
            self._board.add_image("samples", grid, step, dataformats="HWC")

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *error) -> None:
        """Flushes and closes both files."""
        if self._enabled:
            self._jsonl.close()
            self._board.close()


def drop_lines_after(path: pathlib.Path, step: int) -> None:
    """Removes the lines of later steps, and a last line that was not written to its end."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        atomic.write_file(path, "".join(kept).encode())


def picture_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Pictures [n, H, W, 3] in -1..1, row by row, as one uint8 picture; missing cells are black."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    cells = np.full((rows * columns, height, width, channels), -1.0, np.float32)
    cells[:n] = images
    grid = cells.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(rows * height, columns * width, channels)
    return np.round((np.clip(grid, -1, 1) + 1) * 127.5).astype(np.uint8)


class Progress:
    """Speed and time left, measured between logs, pauses for samples and checkpoints left out."""

    def __init__(self, first_step: int, num_steps: int, batch_size: int):
        self._step, self._num_steps, self._batch_size = first_step, num_steps, batch_size
        self._since = time.perf_counter()

    def restart(self, step: int) -> None:
        """Leaves out of the measurement everything since the last log; the clock runs again from `step`."""
        self._step, self._since = step, time.perf_counter()

    def advance(self, step: int) -> tuple[float, float]:
        """(images a second since the last call, seconds left) now that `step` updates are done."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9) / max(step - self._step, 1)
        self.restart(step)
        return self._batch_size / seconds, seconds * (self._num_steps - step)

    def line(self, step: int, values: Mapping[str, float], speed: float, left: float) -> str:
        """E.g. "step 1,200 of 60,000   loss 0.0321   grad 0.12   lr 1.0e-04   212.3 images/s   0:12:31 left"."""
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"step {step:,} of {self._num_steps:,}   loss {values['loss']:.4f}   grad {values['grad_norm']:.3g}   "
            f"lr {values['learning_rate']:.2e}   {speed:.1f} images/s   {hours}:{minutes:02d}:{seconds:02d} left"
        )
