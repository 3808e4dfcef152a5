"""Every comparison with a public implementation leaves its error behind: benchmarks/parity_table.py makes a table of them."""

import json

import pytest


@pytest.fixture
def measured(record_property):
    """Asserts that an error is within its bound, and records both for the table.

    measured(checkpoint, compared, error, bound): whose weights would be loaded, what of the two implementations was
    compared and how the error is counted, the error, and what it may be at most.
    """

    def check(checkpoint: str, compared: str, error: float, bound: float):
        facts = dict(checkpoint=checkpoint, compared=compared, error=float(error), bound=float(bound))
        record_property("parity", json.dumps(facts))
        assert error <= bound

    return check
