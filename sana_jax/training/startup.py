"""From the start of the process to the first step: where the time goes, and executables kept for the next start."""

import pathlib
import time

import jax
from absl import logging


class Spans:
    """Consecutive stretches of time, each closed under its name; `began` is a value of time.perf_counter()."""

    def __init__(self, began: float | None = None):
        self._began = self._last = time.perf_counter() if began is None else began
        self.seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        """What happened since the last call was `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._began

    def line(self) -> str:
        """E.g. "first step after 41.0 s: imports 6.1, init 3.0, data 0.4, compile 30.3, first step 1.2"."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s: {parts}"

    def metrics(self) -> dict[str, float]:
        """For the log, as startup/NAME."""
        return {f"startup/{name.replace(' ', '_')}": seconds for name, seconds in self.seconds.items()}


def keep_compiled(folder: str, workdir: str) -> None:
    """Turns on JAX's persistent compilation cache, so that a restart compiles nothing again; call before compiling.

    In `folder`, or, where that is "", where JAX already has it (JAX_COMPILATION_CACHE_DIR), or else in
    WORKDIR/compilation_cache, which the hosts of a job and a restart on other machines share. Entries are named by a hash of
    the program, the compiler and the devices, and only the first process writes. An entry that a killed process left
    incomplete is compiled again, with a warning, until it is deleted.
    """
    own = str(pathlib.Path(workdir).absolute() / "compilation_cache")
    folder = folder or jax.config.jax_compilation_cache_dir or own
    jax.config.update("jax_compilation_cache_dir", folder)
    logging.info("compiled programs are kept in %s", folder)
