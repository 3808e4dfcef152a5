"""Noticing that another process of the job has ended or is gone, and ending this one with an error that names it."""

import os
import re
import sys
import threading
import time

import jax
from absl import logging
from jax._src import distributed  # the only barrier of JAX's that needs no device: one that is lost may hold them up

PERIOD = 5  # seconds between two meetings
TIMEOUT = 40  # seconds that a process may be late for one; with the period, less than a minute until all have ended
ABORT = 20  # seconds within which JAX aborts a process whose coordinator is gone
LOST = 76  # exit code
ENDED = "sana_jax/ended/"  # in the service's key-value store: the exit code of each process that ends on its own, by its number
_MISSING = re.compile(r"timed out task names:\s*((?:\d+[\s,]*)+)")


class Peers:
    """Meets the watches of the other processes every few seconds, at a barrier of JAX's coordination service.

    A collective that a lost process should have joined hangs (TPU, NCCL), or fails in some of the others with a word of
    closed connections (gloo); JAX's own heartbeat aborts after 100 seconds. The meeting, which runs in a thread of its own,
    times out in all the others at once and says who was missing. Only the loss of process 0, which holds the service, is
    JAX's to tell: it aborts the others at once. A process that ends with an error that it alone has tells its exit code at a
    meeting, and all end with that.
    """

    def __init__(self):
        self._count = jax.process_count()
        self._meetings = 0
        self._code = 0  # with which this process ends on its own
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        if self._count > 1:
            self._thread.start()

    def ask(self) -> None:
        """After an error that a lost process may have caused: returns once all have been met again, or never."""
        seen = self._meetings
        while self._count > 1 and self._meetings < seen + 2:  # the first may have begun before the error
            time.sleep(0.1)

    def leave(self, code: int, timeout: int = 300) -> None:
        """Ends this process with `code`, with the others where they end within `timeout` seconds too.

        Where they do not, they are told the code at the next meeting, and end with it too: the scheduler sees one code, which
        says whether to start the job again. 0 is not told: they go on without this process, until they miss it.
        """
        if self._count > 1:
            try:
                distributed.global_state.client.wait_at_barrier("sana_jax: leaving", timeout * 1000)
                self._leaving.set()
                # Ends the meeting that the thread may be in: one that came out of it while Python ends would abort the process.
                jax.distributed.shutdown()
            except jax.errors.JaxRuntimeError:
                if code:
                    self._code = code
                    self._thread.join()  # it tells the others, and ends this process
                self._exit(code)
            self._thread.join(10)
        sys.exit(code)

    def _watch(self) -> None:
        client = distributed.global_state.client
        while True:
            own = self._code
            try:
                if own:  # before the meeting, so that all know after it
                    client.key_value_set(f"{ENDED}{jax.process_index()}", str(own))
                client.wait_at_barrier("sana_jax: meeting", TIMEOUT * 1000)  # one name: the service forgets none
                ended = client.key_value_dir_get(ENDED)
            except jax.errors.JaxRuntimeError as error:
                if self._leaving.is_set():
                    return
                if not own and not _MISSING.search(str(error)):
                    time.sleep(ABORT)  # the service is gone, and process 0 with it, which is JAX's to tell
                self._exit(own or LOST, "" if own else lost(str(error), self._count))
                return
            if ended:
                code, number = max((int(code), key.removeprefix(ENDED)) for key, code in ended)
                said = f"process {number} of {self._count} ended with exit code {code}; its own log says why."
                self._exit(own or code, "" if own else said)
                return
            self._meetings += 1
            if self._leaving.wait(PERIOD):
                return

    def _exit(self, code: int, message: str = "") -> None:
        if jax.process_index() == 0:
            time.sleep(1)  # the others hear of it from the service, which ends with this process
        if message:
            logging.error("%s", message)
        logging.flush()
        sys.stdout.flush()
        os._exit(code)


def lost(message: str, count: int) -> str:
    """What to tell a person, from the error of a meeting that failed."""
    missing = _MISSING.search(message)
    if missing is None:
        return f"the other processes cannot be reached: {message}"
    names = ", ".join(missing.group(1).replace(",", " ").split())
    return (
        f"lost process {names} of {count}: no sign of life for {TIMEOUT} s; its own log may say why. Start the job again: it "
        f"goes on from the newest checkpoint."
    )
