"""Start-up of a job that runs as several processes, and what one process does for all."""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

N = TypeVar("N", int, float)


def start(config) -> None:
    """Joins this process to the job (`jax.distributed`) if `config.multihost`; call before anything touches a device.

    On TPU pods, GKE, Slurm and Open MPI JAX finds coordinator and process number by itself. Elsewhere they are named.

    Args:
      config: the section `mesh`: coordinator (HOST:PORT of process 0), num_processes and process_id, all three or none.

    Raises:
      ValueError: only some of the three are given, or without `multihost`, or a number is out of range; or none is, and
        JAX does not find them.
    """
    given = {"coordinator": bool(config.coordinator), "num_processes": config.num_processes > 0}
    given["process_id"] = config.process_id >= 0
    if not config.multihost:
        if any(given.values()):
            there = ", ".join(f"mesh.{name}" for name, there in given.items() if there)
            raise ValueError(
                f"{there} is given and mesh.multihost=False; use mesh.multihost=True for several processes."
            )
        return
    if any(given.values()) and not all(given.values()):
        missing = ", ".join(f"mesh.{name}" for name, there in given.items() if not there)
        raise ValueError(
            f"{missing} is missing: give mesh.coordinator, mesh.num_processes and mesh.process_id, or none."
        )
    if not any(given.values()):
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"mesh.multihost=True, and JAX finds no other processes from here ({error}) Give mesh.coordinator, "
                "mesh.num_processes and mesh.process_id, or use mesh.multihost=False."
            ) from error
    elif config.process_id < config.num_processes:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    else:
        raise ValueError(
            f"mesh.process_id={config.process_id} is not from 0 to mesh.num_processes-1={config.num_processes - 1}."
        )
    logging.info("process %d of %d", jax.process_index(), jax.process_count())


def is_first() -> bool:
    """Whether this process is the one that writes files for all."""
    return jax.process_index() == 0


def fetch_to_first(tree):
    """Whole arrays in the first process's memory from arrays spread over the mesh, None elsewhere; all must call it.

    One array at a time, so that a device holds one of them whole and not a second copy of the model.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def fetch(x):
        whole = _everywhere(x.sharding.update(spec=P()))(x)
        host = np.asarray(whole.addressable_data(0)) if is_first() else None
        jax.block_until_ready(whole).delete()
        return host

    return jax.tree.map(fetch, tree)


@functools.cache  # else each call would compile anew
def _everywhere(sharding: NamedSharding) -> Callable:
    return jax.jit(lambda x: x, out_shardings=sharding)


def barrier(name: str) -> None:
    """Waits until every process of the job is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def on_all(condition: bool) -> bool:
    """Whether a condition holds in every process."""
    if jax.process_count() == 1:
        return condition
    return bool(np.all(multihost_utils.process_allgather(np.asarray(condition))))


def highest(number: N) -> N:
    """The highest of the processes' numbers, all int32 or all float32."""
    if jax.process_count() == 1:
        return number
    kind = np.int32 if isinstance(number, int) else np.float32
    return np.max(multihost_utils.process_allgather(kind(number))).item()


def from_first(numbers: Sequence[int]) -> list[int]:
    """The first process's numbers, none of them negative."""
    if jax.process_count() == 1:
        return list(numbers)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    own = np.resize(np.asarray([*numbers, -1], np.int32), length)  # whatever the others have, in the first's length
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).tolist()
