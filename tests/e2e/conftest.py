"""What whole runs of a tiny model share."""

import jax
import pytest
import tiny_run


@pytest.fixture(scope="module")
def compiled_quickly():
    """No program is optimised, and all are shared: compiling is most of these tests' time."""
    options = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_disable_most_optimizations": True}
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    tiny_run.write_data(path)
    return path


@pytest.fixture
def config(data):
    return tiny_run.config(data / "pictures", data / "vae")
