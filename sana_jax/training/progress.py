"""How fast a run is and how well it uses its chips, and the line that a person reads."""

import time
from collections.abc import Iterator, Mapping
from typing import TypeVar

import jax

from sana_jax.parallel.chips import chip_of_device

T = TypeVar("T")


class Progress:
    """Speed, utilisation and time left, measured between logs; pauses for samples and checkpoints are left out.

    MFU is model operations (`sana_jax.flops`) over the published bf16 peak: what rematerialisation computes again does not
    count, and of devices whose peak is not known nothing is claimed.

    Args:
      first_step, num_steps: of the run.
      batch_size: pictures a step, over all hosts.
      picture_flops: of one picture in a training step; of several sizes the mean.
      devices: of the mesh.
    """

    def __init__(self, first_step: int, num_steps: int, batch_size: int, picture_flops: int | float, devices):
        chip = chip_of_device(devices[0].device_kind)
        self._num_steps, self._batch_size, self._devices = num_steps, batch_size, devices
        self._chips = len(devices) / (chip.devices if chip else 1)
        self._picture_seconds = picture_flops / chip.flops if chip else None  # of one chip at its peak
        self.restart(first_step)

    def restart(self, step: int) -> None:
        """Leaves out of the measurement everything since the last log; the clock runs again from `step`."""
        self._step, self._since, self._waited = step, time.perf_counter(), 0.0

    def pause(self, step: int) -> float:
        """As `restart`; returns the seconds since the last log."""
        seconds = time.perf_counter() - self._since
        self.restart(step)
        return seconds

    def fetch(self, batches: Iterator[T]) -> T:
        """The next batch; the time until it is there counts as waiting for data."""
        began = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - began
        return batch

    def advance(self, step: int) -> dict[str, float]:
        """Measurements since the last call, now that `step` updates are done; no speed where the clock saw none of them."""
        measured = {}
        if step > self._step:
            elapsed = max(time.perf_counter() - self._since, 1e-9)
            seconds = elapsed / (step - self._step)
            per_chip = self._batch_size / seconds / self._chips
            measured = {
                "step_seconds": seconds,
                "images_per_second": self._batch_size / seconds,
                "images_per_second_per_chip": per_chip,
                "data_wait": self._waited / elapsed,
            }
            if self._picture_seconds is not None:
                measured["mfu"] = per_chip * self._picture_seconds
        peak = hbm_peak(self._devices)
        if peak is not None:
            measured["hbm_peak_gib"] = peak / 2**30
        self.restart(step)
        return measured

    def line(self, step: int, values: Mapping[str, float]) -> str:
        """E.g. "step 1,200 of 60,000   loss 0.0321   grad 0.12   lr 1.0e-04   212.3 images/s   MFU 41 %   0:12:31 left"."""
        learnt = (
            f"step {step:,} of {self._num_steps:,}   loss {values['loss']:.4f}   grad {values['grad_norm']:.3g}   "
            f"lr {values['learning_rate']:.2e}"
        )
        if "step_seconds" not in values:
            return learnt
        minutes, seconds = divmod(round(values["step_seconds"] * (self._num_steps - step)), 60)
        hours, minutes = divmod(minutes, 60)
        used = f"   MFU {values['mfu']:.0%}" if "mfu" in values else ""
        waiting = f"   {values['data_wait']:.0%} waiting for data" if values["data_wait"] > 0.05 else ""
        speed = f"{values['images_per_second']:.1f} images/s{used}{waiting}"
        return f"{learnt}   {speed}   {hours}:{minutes:02d}:{seconds:02d} left"


def hbm_peak(devices) -> int | None:
    """Most bytes that this process's devices have had in use; None where the backend does not count them."""
    stats = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    peaks = [each["peak_bytes_in_use"] for each in stats if each and "peak_bytes_in_use" in each]
    return max(peaks, default=None)
