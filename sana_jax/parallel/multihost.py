"""Start-up of a job that runs as several processes, and what one process does for all."""

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils


def start(multihost: bool) -> None:
    """Joins this process to the job (`jax.distributed`); call before anything touches a device.

    On TPU pods and under SLURM or Open MPI JAX finds coordinator and process number by itself; elsewhere it reads
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if multihost:
        jax.distributed.initialize()
        logging.info("process %d of %d", jax.process_index(), jax.process_count())


def is_first() -> bool:
    """Whether this process is the one that writes files for all."""
    return jax.process_index() == 0


def fetch(tree):
    """Whole arrays in host memory from arrays spread over the mesh; every process must call it.

    One array at a time, so that no device holds a second copy of the model.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def barrier(name: str) -> None:
    """Waits until every process of the job is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
