"""A run of several processes that loses one, or of which one has an error alone (see benchmarks/faults.py)."""

import pytest

from benchmarks import faults
from benchmarks.lab import Lab


@pytest.mark.slow
def test_processes_that_are_left_end_with_an_error_that_names_the_lost_one_and_go_on_when_all_start_again(tmp_path):
    """One of four is killed, frozen, terminated twice, has a corrupt record; the one that coordinates the others is killed."""
    lab = Lab(tmp_path, steps=44)
    faults.lost_processes(lab, kills=1, freezes=1, timeout=15)  # train.py's 40 would only take longer
