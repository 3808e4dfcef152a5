"""What tests that compile for TPUs share."""

import jax
import pytest


@pytest.fixture
def compiled_quickly():
    """Without passes that take a third to half of the time; what is exchanged stays as it is (compared on split meshes)."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", before)
