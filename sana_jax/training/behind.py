"""Work of the host behind the training steps."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """Does pieces of work in a thread, in the order in which they were given. They must not touch a device: the steps have them."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, "behind")
        self._begun: list[Future] = []

    def start(self, function: Callable, *arguments) -> None:
        """Gives the thread a piece of work; raises what one before, which is done, has raised."""
        done = [piece for piece in self._begun if piece.done()]
        self._begun = [piece for piece in self._begun if not piece.done()] + [self._pool.submit(function, *arguments)]
        for piece in done:
            piece.result()

    def wait(self) -> None:
        """Until nothing is left to do; raises what a piece has raised."""
        begun, self._begun = self._begun, []
        for piece in begun:
            piece.result()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Waits; where an error ends the run, that one is raised."""
        self._pool.shutdown()
        if kind is None:
            self.wait()
