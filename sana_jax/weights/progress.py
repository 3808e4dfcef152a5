"""How far reading a large file has come: a line on the terminal, or log entries where there is none."""

import sys
import time
from collections.abc import Callable

from absl import logging

_SHOWN_FROM = 10**9  # bytes; less is there before one has read the line
_LOG_SECONDS = 10.0
_WIDTH = 30  # characters of the bar


def display(what: str) -> Callable[[int, int], None]:
    """A function to be called with (bytes done, bytes in all); it shows nothing below 1 GB.

    Args:
      what: is read, e.g. a folder.
    """
    start = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if total < _SHOWN_FROM:
            return
        now = time.monotonic()
        rate = done / 1e9 / max(now - start, 1e-9)
        amount = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate:.2f} GB/s"
        if sys.stderr.isatty():
            bar = "#" * (_WIDTH * done // total)
            # The line is written over itself, and stays when the last byte is there.
            sys.stderr.write(f"\r{what} [{bar:{_WIDTH}}] {amount}" + ("\n" if done == total else ""))
            sys.stderr.flush()
        elif now - last > _LOG_SECONDS or done == total:
            logging.info("%s: read %s", what, amount)
            last = now

    return show
