"""Batches made ready behind the training steps."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

DEPTH = 2  # items that are ready

# Batches on the devices beside the one that a step works on: the next step's, which has been dispatched behind it, those
# that are ready, and one in the thread's hand.
WAITING = DEPTH + 2


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """Yields `items` in order while a thread keeps up to DEPTH of them ready.

    Whatever the source raises is raised here, in its place in the order. Closing the generator ends the thread.
    """
    ready: queue.Queue = queue.Queue(DEPTH)
    closed = threading.Event()

    def offer(entry) -> bool:
        while not closed.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for item in items:
                if not offer((item, None)):
                    return
            offer((None, StopIteration()))
        except Exception as error:  # noqa: BLE001 - handed to the consumer, who raises it
            offer((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()
