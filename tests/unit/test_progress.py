"""What a run says of its own speed."""

import time
from types import SimpleNamespace

import jax
import pytest

from sana_jax.training.progress import Progress, hbm_peak


def device(kind, **stats):
    return SimpleNamespace(device_kind=kind, process_index=0, memory_stats=lambda: stats or None)


def measured(monkeypatch, devices, **options):
    """Ten steps of 64 pictures in 20 seconds, 5 of them spent waiting for data."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress = Progress(0, 10_000, 64, options.get("picture_flops", 10**12), devices)

    def batches():
        clock[0] += 5
        yield "batch"

    assert progress.fetch(batches()) == "batch"
    clock[0] += 15
    return progress, progress.advance(10)


def test_speed_waiting_and_memory_are_measured_between_logs(monkeypatch):
    _, values = measured(monkeypatch, [device("NVIDIA H100 80GB HBM3", peak_bytes_in_use=3 * 2**30)] * 2)
    assert values == {
        "step_seconds": 2.0,
        "images_per_second": 32.0,
        "images_per_second_per_chip": 16.0,
        "data_wait": 0.25,
        "mfu": pytest.approx(16 * 1e12 / 989.4e12),
        "hbm_peak_gib": 3.0,
    }


def test_two_devices_of_one_chip_count_as_one(monkeypatch):
    _, values = measured(monkeypatch, [device("TPU7x")] * 8)
    assert values["images_per_second_per_chip"] == 8.0
    assert values["mfu"] == pytest.approx(8 * 1e12 / 2307e12)


def test_of_a_device_without_a_published_peak_no_mfu_is_claimed(monkeypatch):
    _, values = measured(monkeypatch, [device("cpu")])
    assert values.keys() == {"step_seconds", "images_per_second", "images_per_second_per_chip", "data_wait"}
    assert hbm_peak(jax.devices("cpu")) is None


def test_progress_line_says_speed_use_and_time_left(monkeypatch):
    progress, values = measured(monkeypatch, [device("TPU v5")], picture_flops=6 * 10**12)
    line = progress.line(1200, values | {"loss": 0.03211, "grad_norm": 0.5, "learning_rate": 1e-4})
    assert line == (
        "step 1,200 of 10,000   loss 0.0321   grad 0.5   lr 1.00e-04   32.0 images/s   MFU 42%   25% waiting for data   "
        "4:53:20 left"
    )


def test_of_a_step_that_the_clock_did_not_see_no_speed_is_claimed(monkeypatch):
    progress, _ = measured(monkeypatch, [device("TPU v5", peak_bytes_in_use=2**30)])
    progress.restart(11)
    values = progress.advance(11)
    assert values == {"hbm_peak_gib": 1.0}
    line = progress.line(11, values | {"loss": 0.5, "grad_norm": 0.25, "learning_rate": 1e-4})
    assert line == "step 11 of 10,000   loss 0.5000   grad 0.25   lr 1.00e-04"
