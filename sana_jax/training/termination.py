"""Notice that the run is to end: the machine is about to be taken away, or somebody pressed Ctrl-C."""

import signal
import threading

import jax
from absl import logging
from jax._src import distributed  # what its public function does, for one caller only: see Termination


class Preempted(Exception):
    """The run saved and ended early because it was asked to; started again, it goes on."""


class Termination:
    """Notices SIGTERM, which schedulers send before they take a machine away, and Ctrl-C.

    Where `jax.distributed` runs, its preemption service takes the signal, whichever process gets it. It collects the number
    of the last question that each process asked, and says yes in all of them to the number after the highest. So a signal
    is lost where nobody has asked yet, and where a smaller number follows a greater one. Hence questions are counted, from
    the beginning of the start-up on, and the service is hidden from Orbax, which asks too, with the steps it saves.

    Otherwise a handler takes the signal, and the run ends after the step it is in; signals reach the main thread only, so
    that elsewhere (tests, notebooks) nothing is noticed and nothing changed.

    The first Ctrl-C (SIGINT) is passed on as SIGTERM; the second does what it did before, which ends the process at once.
    """

    def __init__(self):
        self._received = False
        self._before = {}  # signal -> the handler that it had
        self._service = None
        self._questions = 0

    def due(self) -> bool:
        """Whether to save and end now; every process asks after every step."""
        if self._service is None:
            return self._received
        self._questions += 1
        return self._service.reached_sync_point(self._questions)

    def __enter__(self) -> "Termination":
        if jax.distributed.is_initialized():
            state = distributed.global_state
            self._service, state.preemption_sync_manager = state.preemption_sync_manager, None
            if self._service is None:
                raise ValueError(
                    "jax_enable_preemption_service is off: the processes of a job could not agree on the step to save and "
                    "end at when one of them is told to. Leave it on."
                )
            self.due()
        if threading.current_thread() is threading.main_thread():
            if self._service is None:
                self._handle(signal.SIGTERM, self._on_signal)
            if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):  # as it is in the background
                self._handle(signal.SIGINT, self._on_interrupt)
        return self

    def _handle(self, number, handler):
        self._before[number] = signal.signal(number, handler)

    def _on_signal(self, number, frame):
        del number, frame
        logging.warning("SIGTERM: saving after this step (the first, if the run is still starting), then ending")
        self._received = True

    def _on_interrupt(self, number, frame):
        del frame
        signal.signal(number, self._before.pop(number))
        logging.warning("Ctrl-C: as SIGTERM; press it again to end at once, without saving")
        signal.raise_signal(signal.SIGTERM)  # to this thread: `os.kill` might ask another, which comes to it later

    def __exit__(self, *error) -> None:
        if self._service is not None:
            distributed.global_state.preemption_sync_manager = self._service
        for number, handler in self._before.items():
            signal.signal(number, handler)
