"""Parameters that a thread reads while this one does something else: compile what will use them."""

import concurrent.futures
from collections.abc import Callable


class Reading:
    """Parameters on their way.

    Attributes:
      shapes: what they will be, a tree of `jax.ShapeDtypeStruct` with their places.
    """

    def __init__(self, shapes: dict, read: Callable[[], dict]):
        """Starts to `read` in a thread."""
        self.shapes = shapes
        executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._future = executor.submit(read)
        executor.shutdown(wait=False)

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return self._future.done()

    def result(self) -> dict:
        """The parameters, waited for; raises what reading them raised."""
        return self._future.result()
