"""The table of chips is found by both kinds of name, and claims nothing of devices that it does not hold."""

import jax
import pytest

from sana_jax.parallel.chips import CHIPS, chip_of_device, chip_of_topology


def test_a_topology_and_its_devices_name_the_same_chip():
    assert chip_of_topology("v5p:4x4x4") is chip_of_device("TPU v5") is chip_of_device("TPU v5p")
    assert chip_of_topology("h100") is chip_of_device("NVIDIA H100 80GB HBM3")


def test_no_name_stands_for_two_chips():
    names = [name for chip in CHIPS for name in (chip.name, *chip.device_kinds)]
    assert len(set(names)) == len(names)


def test_of_a_cpu_nothing_is_claimed():
    assert chip_of_device(jax.devices("cpu")[0].device_kind) is None


def test_the_published_h100_peak_is_the_dense_one():
    chip = chip_of_topology("h100")
    assert chip.flops / chip.hbm_bandwidth == pytest.approx(295, rel=0.01)  # operations per byte at the ridge


def test_a_topology_of_an_unknown_chip_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="'v9x' is not one of v4, v5e, v5p"):
        chip_of_topology("v9x:2x2")
