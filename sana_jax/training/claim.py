"""One run at a time saves to a folder: the one that began last."""

import json
import os
import pathlib
import secrets
import socket
import time

from sana_jax import atomic
from sana_jax.checkpoint import CheckpointError, UnwrittenError
from sana_jax.parallel import multihost


class Claim:
    """WORKDIR/run.json names the run that saves there. A new run takes it over, and the one before notices at its next save.

    So it is with a run that was started twice, and with one that a scheduler took for dead and started elsewhere. Of several
    processes the first one acts for all.
    """

    def __init__(self, workdir: str | pathlib.Path):
        """Raises UnwrittenError where the folder cannot be written to."""
        self._file, self._token = pathlib.Path(workdir, "run.json"), secrets.token_hex(8)
        if not multihost.is_first():
            return
        claim = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            atomic.write_file(self._file, (json.dumps(claim | {"token": self._token}, indent=1) + "\n").encode())
        except OSError as error:
            raise UnwrittenError(f"{self._file} could not be written: {error}.") from error

    def check(self) -> None:
        """To be called before anything is saved.

        Raises:
          CheckpointError: another run has taken over.
        """
        if not multihost.is_first():
            return
        try:
            found = json.loads(self._file.read_text())
            host, process, since, token = (found[name] for name in ("host", "process", "since", "token"))
        except (OSError, ValueError, KeyError, TypeError):
            return  # somebody has tidied up; nothing says that another run is here
        if token != self._token:
            raise CheckpointError(
                f"{self._file.parent} belongs to another run by now (host {host}, process {process}, since {since}): this "
                "one ends and saves nothing more. Give each run a --workdir of its own."
            )
