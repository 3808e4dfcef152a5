"""What the comparisons with public implementations share: the record of their errors, and two fixtures of the pipelines.

benchmarks/parity_table.py makes a table of the errors.
"""

import json

import numpy as np
import pytest

from sana_jax import SanaPipeline
from sana_jax.diffusion.noise import initial_noise


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


@pytest.fixture(scope="module")
def ours(theirs):
    """Our pipeline from the folder of a file's `theirs`: (diffusers' pipeline, the folder it saved itself to)."""
    return SanaPipeline.from_pretrained(theirs[1])


@pytest.fixture(scope="module")
def noise():
    """Of two pictures of 16x16 pixels."""
    return np.asarray(initial_noise(0, np.arange(2), (4, 4, 8)))
