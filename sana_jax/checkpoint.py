"""Training state on disk (Orbax): what is saved, what is kept, and what can be read again.

WORKDIR/checkpoints/STEP holds the state and a record (`training.resume`) with a checksum of every array.
"""

import contextlib
import pathlib
import re
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator  # see `_number_alike`

from sana_jax.parallel import multihost

_WAITS = 1, 5  # seconds before a checkpoint that cannot be read is tried again, and once more


class CheckpointError(RuntimeError):
    """None of the checkpoints can be read, or another run saves to the folder."""


class UnwrittenError(CheckpointError):
    """What a run leaves could not be written; perhaps it can the next time."""


class Checkpoints:
    """The checkpoints of one run, of which the newest few are kept, and every so many steps one for ever.

    Saving returns once the arrays are copied; the files are written behind the next steps, whole or not at all.
    """

    def __init__(self, workdir: str | pathlib.Path, keep: int, keep_every: int = 0):
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=False,  # another run may be at work there: see `remove_unfinished`
        )
        self._saving: tuple[int, ocp.AsyncResponse] | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first, as the first process sees them."""
        return multihost.from_first([checkpoint.step for checkpoint in reversed(self._checkpointer.checkpoints)])

    def record(self) -> dict | None:
        """The newest checkpoint's record (`training.resume`), or of those before it if it cannot be read; None: no checkpoint.

        Raises:
          CheckpointError: none can be read.
        """
        failures = {}
        for step in self.steps():
            try:
                return self._record(step)
            except Exception as error:  # noqa: BLE001 - see `_read`
                failures[step] = root_cause(error)
        if failures:
            raise self._unreadable(failures)
        return None

    def restore(self, abstract_state):
        """The newest state that can be read, placed as `abstract_state` (ShapeDtypeStructs with shardings) says.

        Any mesh and any number of processes will do. A checkpoint that cannot be read, or whose arrays are not those that
        were saved, is passed over with a warning, and renamed so that it is neither listed nor in the way again.

        Raises:
          CheckpointError: none can be read. Nothing is renamed then.
        """
        failures = {}
        for step in self.steps():
            for seconds in (0, *_WAITS):  # a file system that fails for a moment breaks no checkpoint
                time.sleep(seconds)
                state, reason = self._read(step, abstract_state)
                if reason is None:
                    self._set_aside(failures)
                    logging.info("resumed from step %d in %s", step, self._folder)
                    return state
                logging.warning("%s cannot be read: %s", self._folder / str(step), reason)
            failures[step] = reason
            logging.warning("CHECKPOINT %s CANNOT BE USED: %s", self._folder / str(step), reason)
        raise self._unreadable(failures)

    def remove_unfinished(self) -> None:
        """Removes what killed runs had begun to save; for a run that has taken the folder over (`training.claim`)."""
        if multihost.is_first():
            for folder in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(folder, ignore_errors=True)

    def save(self, step: int, state, record: dict) -> None:
        """Starts saving; waits first where the save before is still being written.

        Raises:
          UnwrittenError: the save before, or this one so far, could not be written.
        """
        self._wait()
        record = record | {"checksums": checksums(state)}
        try:
            self._saving = step, self._checkpointer.save_async(step, state, custom_metadata=record, force=True)
        except Exception as error:
            raise self._unwritten(step, error) from error

    def check(self) -> None:
        """Raises UnwrittenError once the save that runs behind the steps has failed; cheap enough for every step."""
        self._wait(timeout=0.0)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Waits until the last save is on disk."""
        failed = isinstance(error, CheckpointError)
        try:
            self._wait()
        except CheckpointError:
            failed = True
            raise
        finally:
            # Orbax raises the error of a failed save once more.
            with contextlib.suppress(Exception) if failed else contextlib.nullcontext():
                self._checkpointer.close()

    def _wait(self, timeout: float | None = None) -> None:
        if self._saving is None:
            return
        step, response = self._saving
        try:
            response.result(timeout=timeout)
        except Exception as error:
            if timeout is not None and isinstance(error, TimeoutError):
                return  # still being written
            self._saving = None
            raise self._unwritten(step, error) from error
        self._saving = None

    def _read(self, step: int, abstract_state) -> tuple[Any, str | None]:
        """(state, None), or (None, why some process cannot have it); all processes get the one or all the other."""
        reason = None
        try:
            record, state = self._record(step), self._load(step, abstract_state)
        except Exception as error:  # noqa: BLE001 - whatever a broken file makes Orbax and TensorStore raise
            reason = root_cause(error)
        if not multihost.on_all(reason is None):
            _number_alike()
            return None, reason or "another process cannot read it"
        reason = damage(record.get("checksums", {}), checksums(state))
        return (None, reason) if reason else (state, None)

    def _record(self, step: int) -> dict:
        record = ocp.metadata(self._folder / str(step)).custom_metadata
        if not record:  # Orbax takes a file that it cannot parse for an empty one
            raise ValueError("its record of config and checksums is missing")
        return record

    def _load(self, step: int, abstract_state):
        # Every process reads for itself: one that fails must not leave the others waiting in a barrier of Orbax's.
        own = ocp.multihost.process_index()
        context = ocp.Context()
        context.multiprocessing.primary_host = own
        context.multiprocessing.active_processes = {own}
        with context:
            return ocp.load(self._folder / str(step), abstract_state)

    def _set_aside(self, failures: dict[int, str]) -> None:
        if failures and multihost.is_first():
            for step in failures:
                folder = self._folder / str(step)
                folder.rename(folder.with_name(f"{step}.unreadable-{time.time():.0f}"))
        if failures:
            multihost.barrier("broken checkpoints renamed")
            self._checkpointer.reload()

    def _unreadable(self, failures: dict[int, str]) -> CheckpointError:
        lines = "".join(f"\n  {step}: {reason}" for step, reason in failures.items())
        return CheckpointError(
            f"no checkpoint in {self._folder} can be used; restore one of them, or start a new run with another --workdir:"
            f"{lines}"
        )

    def _unwritten(self, step: int, error: Exception) -> UnwrittenError:
        before = [checkpoint.step for checkpoint in self._checkpointer.checkpoints if checkpoint.step < step]
        rest = (
            f"The run goes on from step {before[-1]} when it is started again."
            if before
            else "There is none before it."
        )
        return UnwrittenError(f"the checkpoint of step {step} could not be written: {root_cause(error)}. {rest}")


def _number_alike() -> None:
    """Brings Orbax's count of loads and saves to the same number in all processes.

    It names the barriers of a save. A load that fails early is not counted, so that a process that alone could not read a
    checkpoint would wait at other barriers than the rest in every later save.
    """
    own = int(OperationIdGenerator.get_current_operation_id())
    for _ in range(own, multihost.highest(own)):
        OperationIdGenerator.next_operation_id()


def root_cause(error: BaseException) -> str:
    """Kind and first line of the error that the others were raised from; Orbax's own speak of handlers and registries."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    first = (str(error).splitlines() or [""])[0]
    return type(error).__name__ + ": " + re.split(r" \[\w+=", first)[0]  # TensorStore's specifications are long


def checksums(state) -> dict[str, int]:
    """For each array, by its path in the tree, the sum of its words modulo 2^32: the same on every mesh.

    A flipped bit in a file changes what is read without an error, and changes this.
    """
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    return dict(zip(paths, jax.device_get(_word_sums(jax.tree.leaves(state))).tolist(), strict=True))


@jax.jit
def _word_sums(arrays):
    def one(x):
        words = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)

    return jnp.stack([one(x) for x in arrays])


def damage(saved: dict[str, int], read: dict[str, int]) -> str | None:
    """Which arrays are not those that were saved; None: all are."""
    changed = [path for path, number in read.items() if saved.get(path, number) != number]
    return f"{', '.join(changed[:3])} differ from what was saved ({len(changed)} arrays)" if changed else None
