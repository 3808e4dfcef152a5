"""A window of steps traced by JAX's profiler."""

import pathlib

import jax
from absl import logging


def check_window(window: tuple[int, ...]) -> None:
    """Raises ValueError for `train.profile_steps` that are neither (first, last) nor ()."""
    if window and not (len(window) == 2 and 1 <= window[0] <= window[1]):
        raise ValueError(f"train.profile_steps={tuple(window)} is not (first, last) with 1 <= first <= last, nor ().")


class StepProfiler:
    """Traces the steps first..last (counted from 1) into WORKDIR/profile, for xprof and TensorBoard's profile tab.

    The first step after a start compiles and is never traced. One process traces, which stands for all.
    """

    def __init__(self, window: tuple[int, ...], workdir: str, enabled: bool):
        """`window`: (first, last), or () for none; `enabled`: whether this process traces."""
        self._window = window if enabled else ()
        self._folder = str(pathlib.Path(workdir) / "profile")
        self._running = False

    def at(self, step: int, metrics) -> None:
        """Begins or ends the trace after step number `step`, whose results `metrics` are waited for then."""
        if not self._window:
            return
        first, last = self._window
        wanted = first <= step + 1 <= last
        if wanted == self._running:
            return
        jax.block_until_ready(metrics)
        if wanted:
            jax.profiler.start_trace(self._folder)
        else:
            jax.profiler.stop_trace()
            logging.info("steps to %s traced: tensorboard --logdir=%s", f"{step:,}", self._folder)
        self._running = wanted

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *error) -> None:
        """Ends a trace that the run's end cut short."""
        if self._running:
            jax.profiler.stop_trace()
