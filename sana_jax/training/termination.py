"""Notice that the machine is about to be taken away."""

import signal
import threading

import jax
from absl import logging
from jax.experimental import multihost_utils


class Preempted(Exception):
    """The run saved and ended early because it was asked to; started again, it goes on."""


class Termination:
    """Notices SIGTERM, which schedulers send before they take a machine away.

    Where `jax.distributed` runs, its preemption service takes the signal, whichever process gets it, and agrees with the
    others on a step that none has passed yet. Otherwise a handler does, and the run ends after the step it is in; signals
    reach the main thread only, so that elsewhere (tests, notebooks) nothing is noticed and nothing changed.
    """

    def __init__(self):
        self._received = False
        self._before = None

    def at(self, step: int) -> bool:
        """Whether to save and end now that `step` updates are done; every process asks after every step."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread() and not jax.distributed.is_initialized():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def _on_signal(self, number, frame):
        del number, frame
        logging.warning("SIGTERM: saving, then ending")
        self._received = True

    def __exit__(self, *error) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
