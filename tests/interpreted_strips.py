"""The TPU's kernels that work on strips of rows, interpreted on a CPU."""

import contextlib

import pytest
from jax.experimental.pallas import tpu as pltpu
from sana_jax.kernels import tpu_strips


@contextlib.contextmanager
def small_strips():
    """Kernels take 16 positions at a time: a step takes long, and strips are to meet. Memory nobody wrote is NaN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_strips, "BLOCK_POSITIONS", 16)
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
            yield
