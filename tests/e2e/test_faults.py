"""Runs that are broken and started again are, in the end, the run that nothing interrupted (see benchmarks/faults.py)."""

import pytest

from benchmarks import faults
from benchmarks.lab import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"), steps=40)


def test_a_run_killed_three_times_at_random_moments_loses_nothing_saved(lab):
    faults.killed(lab, times=3)


def test_a_run_terminated_three_times_saves_the_step_it_is_in(lab):
    faults.terminated(lab, times=3)


@pytest.mark.slow
def test_a_broken_newest_checkpoint_is_passed_over_three_times(lab):
    faults.truncated(lab, times=1)
    faults.missing(lab, times=1)
    faults.flipped(lab, times=1)
    faults.all_broken(lab)


@pytest.mark.slow
def test_a_run_that_goes_on_on_another_mesh_differs_by_rounding(lab):
    faults.moved(lab)


@pytest.mark.slow
def test_a_full_disk_is_told_and_survived(lab):
    faults.disk_full(lab)


@pytest.mark.slow
def test_a_batch_that_is_not_a_number_is_named_and_survived(lab):
    faults.not_a_number(lab)


@pytest.mark.slow
def test_a_corrupt_record_is_named_and_survived(lab):
    faults.corrupt_record(lab)
