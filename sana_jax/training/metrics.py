"""Measurements of a run: the means between two logs, and where they are written."""

import io
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float
from PIL import Image

from sana_jax import atomic


BOARD_PIXELS = 2048  # longest side of a picture in TensorBoard


class NonFiniteError(RuntimeError):
    """A metric became infinite or not a number."""


class Binned(NamedTuple):
    """A metric whose values are told apart by another quantity in 0..1, e.g. the loss by noise level.

    Logged is the mean of each bin over all values since the last log, under NAME/LOWER_EDGE; bins without values are not.
    """

    sums: Float[Array, "bins"]
    counts: Float[Array, "bins"]


class MetricWindow:
    """Metrics of the steps since the last log, left on the device until they are asked for.

    Fetching waits for the step it belongs to. The loop asks for all but the newest, so that a step is always in flight
    while the host looks at the numbers of those before.

    Steps whose metric "skipped" is true made no update; they are left out of the means, and more than `may_skip` of them in
    a row are an error. The row is counted here and not in the training state: after a restart it starts anew.
    """

    def __init__(self, may_skip: int = 0):
        self._pending: list[tuple[int, Mapping[str, jax.Array | Binned]]] = []
        self._may_skip, self._row = may_skip, []

    def add(self, step: int, metrics: Mapping[str, jax.Array | Binned]) -> None:
        """Keeps the metrics of update number `step` (counted from 1)."""
        self._pending.append((step, metrics))

    def take(self, last: int) -> tuple[int, dict[str, float]]:
        """Number of steps up to and including `last`, and their mean metrics; of "skipped" the number.

        Raises:
          NonFiniteError: a metric of one of these steps is not finite and the step was not skipped, or too many were in a
            row; names the metric and the steps.
        """
        taken = [(step, metrics) for step, metrics in self._pending if step <= last]
        self._pending = [(step, metrics) for step, metrics in self._pending if step > last]
        fetched = jax.device_get([metrics for _, metrics in taken])
        made = []
        for (step, _), values in zip(taken, fetched, strict=True):
            if values.get("skipped", False):
                self._count_skipped(step, values)
                continue
            self._row.clear()
            name = _first_nonfinite(values)
            if name:
                raise NonFiniteError(
                    f"{name} became {values[name]} within steps [{taken[0][0]}, {taken[-1][0]}], first at step {step}. "
                    "Started again, the run comes to the same batch; with train.skip_nonfinite=5 it passes over up to five such "
                    "updates in a row. Or start a new run from the last export (config.init_from) with a smaller "
                    "optimizer.learning_rate."
                )
            made.append(values)
        means = _means(made)
        if fetched and "skipped" in fetched[0]:
            means["skipped"] = float(len(taken) - len(made))
        return len(taken), means

    def _count_skipped(self, step: int, values) -> None:
        self._row.append(step)
        name, row, most = _first_nonfinite(values), self._row, self._may_skip
        logging.warning(
            "step %d skipped: %s is %s (%d of at most %d in a row)", step, name, values[name], len(row), most
        )
        if len(row) > most:
            raise NonFiniteError(
                f"{name} became {values[name]} within steps [{row[0]}, {row[-1]}]: {len(row)} updates in a row were "
                f"skipped, train.skip_nonfinite={most}. Look at these batches, or use a smaller optimizer.learning_rate."
            )


def _first_nonfinite(values: Mapping[str, np.ndarray | Binned]) -> str | None:
    return next((name for name, v in values.items() if not isinstance(v, Binned) and not np.isfinite(v)), None)


def _means(values: list[Mapping[str, np.ndarray | Binned]]) -> dict[str, float]:
    """Of one or more steps' metrics."""
    means = {}
    for name, first in values[0].items() if values else ():
        entries = [v[name] for v in values]
        if not isinstance(first, Binned):
            means[name] = float(np.mean(entries, dtype=np.float64))
            continue
        sums, counts = (np.sum(part, axis=0, dtype=np.float64) for part in zip(*entries, strict=True))
        bins = len(counts)
        means |= {f"{name}/{i / bins:g}": float(sums[i] / counts[i]) for i in range(bins) if counts[i]}
    return means


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
            self._board = tensorboard_writer()(str(folder / "tensorboard"), purge_step=first_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of one step."""
        if self._enabled:
            with (self._folder / "metrics.jsonl").open("a") as file:  # a mounted bucket shows what was closed
                file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def pictures(self, step: int, grid: np.ndarray) -> None:
        """Writes a uint8 picture [H, W, 3] as samples/step_STEP.png and, made smaller where it is large, to TensorBoard."""
        if self._enabled:
            folder = self._folder / "samples"
            folder.mkdir(exist_ok=True)
            picture = Image.fromarray(grid)
            picture.save(content := io.BytesIO(), "PNG")
            atomic.write_file(folder / f"step_{step:08d}.png", content.getvalue())
            small = np.asarray(picture.reduce(-(-max(picture.size) // BOARD_PIXELS)))
            self._board.add_image("samples", small, step, dataformats="HWC")

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *error) -> None:
        """Flushes and closes what is open."""
        if self._enabled:
            self._board.close()


def tensorboard_writer() -> type:
    """tensorboardX's SummaryWriter, imported without PyTorch, which it would take along for three seconds where there is one."""
    absent = {} if "torch" in sys.modules else {"torch": None}  # None: an ImportError, which it expects
    sys.modules |= absent
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in absent:
            del sys.modules[name]
    return SummaryWriter


def drop_lines_after(path: pathlib.Path, step: int) -> None:
    """Removes the lines of later steps, and what a machine that went down left unfinished or damaged."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [_step_of(line) for line in lines]
    kept = [line for line, its in zip(lines, steps, strict=True) if its is not None and its <= step]
    if damaged := steps[:-1].count(None):
        logging.warning("%s: removed %d damaged lines", path, damaged)
    if kept != lines:
        atomic.write_file(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def picture_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Pictures [n, H, W, 3] in -1..1, row by row, as one uint8 picture; missing cells are black."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    cells = np.full((rows * columns, height, width, channels), -1.0, np.float32)
    cells[:n] = images
    grid = cells.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(rows * height, columns * width, channels)
    return np.round((np.clip(grid, -1, 1) + 1) * 127.5).astype(np.uint8)
