"""Freed memory that the process keeps: fewer page faults on a CPU, nothing changed beside an accelerator."""

import ctypes

import jax
import processes
import pytest

from sana_jax.training import host_memory

FAULTS = """
import json, resource, sys
import jax
import jax.numpy as jnp
from sana_jax.training.host_memory import keep_freed

kept = keep_freed() if sys.argv[1] == "keep" else False
product = jax.jit(lambda x: (x * 2.0) @ x[:, :8])  # reads a temporary of 64 MB

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    product(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

x = jnp.ones((4096, 4096))
print(json.dumps([kept, [faults() for _ in range(4)][-1]]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="is glibc's")
def test_a_program_finds_the_pages_of_its_last_call():
    left, faults = processes.run_script(FAULTS, "leave", devices=1)
    kept, fewer = processes.run_script(FAULTS, "keep", devices=1)
    assert not left and kept
    assert faults > 10_000  # of 4 KB
    assert fewer < faults / 10


@pytest.mark.parametrize("name", ["nvidia0", "kfd", "accel3", "vfio/7"])
def test_beside_an_accelerator_malloc_stays_as_it_is(name, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: type("Libc", (), {"mallopt": lambda *a: calls.append(a) or 1}))
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        assert not host_memory.keep_freed(str(tmp_path)) and not calls
        jax.config.update("jax_platforms", "cuda,cpu")
        assert not host_memory.keep_freed(str(tmp_path / "none")) and not calls
        jax.config.update("jax_platforms", "cpu")
        assert host_memory.keep_freed(str(tmp_path)) and len(calls) == 3
    finally:
        jax.config.update("jax_platforms", before)
