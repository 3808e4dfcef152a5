"""Training state on disk (Orbax): what is saved, and what must agree before a run goes on from it."""

import pathlib

import jax
from absl import logging
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

# Fields that may differ between the run that saved and the run that resumes: they change neither the model nor the
# sequence of updates. Everything else must agree.
FREE_FIELDS = (
    "mesh.",
    "data.path",
    "data.cache_mb",
    "data.threads",
    "data.prefetch",
    "train.num_steps",  # listed by `contradictions` where a learning-rate decay depends on it
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.export_dtype",
    "train.accumulate_steps",
    "train.skip_nonfinite",
    "train.profile_steps",
    "train.compilation_cache",
    "sample.",
    "init_from",
)


class Checkpoints:
    """The checkpoints of one run: WORKDIR/checkpoints/STEP, each the state and a record (config, data position).

    Saving returns once the arrays are copied; the files are written behind the next steps, whole or not at all.
    """

    def __init__(self, workdir: str | pathlib.Path, keep: int):
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            pathlib.Path(workdir).absolute() / "checkpoints",
            preservation_policy=policies.LatestN(keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None where there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def record(self, step: int) -> dict:
        """The record saved beside the state: {"config": ..., "data_position": ..., "mesh": ..., "versions": ...}."""
        return self._checkpointer.metadata(step).custom_metadata

    def save(self, step: int, state, record: dict) -> None:
        """Starts saving; waits first where the save before is still being written."""
        self._checkpointer.save_async(step, state, custom_metadata=record, force=True)

    def restore(self, step: int, abstract_state):
        """The state at `step`, placed as `abstract_state` (ShapeDtypeStructs with shardings) says, on any mesh."""
        state = self._checkpointer.load(step, abstract_state)
        logging.info("resumed from step %d in %s", step, self._checkpointer.directory)
        return state

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        """Waits until the last save is on disk."""
        self._checkpointer.close()


def make_record(config: ConfigDict, step: int, mesh) -> dict:
    """What a checkpoint says of itself, JSON-able. Batch number `step` is the next one to train on."""
    return {
        "config": plain(config),
        "data_position": step,
        "mesh": dict(mesh.shape),
        "versions": {"jax": jax.__version__},
    }


def plain(value):
    """A config as dicts, lists and scalars, as JSON gives it back."""
    if isinstance(value, ConfigDict | dict):
        return {str(name): plain(value[name]) for name in value}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def contradictions(saved: dict, config: ConfigDict) -> list[str]:
    """Lines "field: saved -> now" for every field in which a config contradicts a checkpoint's.

    Fields in FREE_FIELDS may differ; the number of steps only under a constant learning rate, because a decay to
    its end is another sequence of updates. A field that the checkpoint does not know is newer than it, and does not
    contradict it.
    """

    def flatten(tree, prefix=""):
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    old, new = dict(flatten(saved)), dict(flatten(plain(config)))
    free = FREE_FIELDS
    if new.get("optimizer.schedule") != "constant":
        free = tuple(name for name in free if name != "train.num_steps")
    return [
        f"{name}: {value!r} -> {new.get(name, '(absent)')!r}"
        for name, value in sorted(old.items())
        if (name not in new or new[name] != value) and not name.startswith(free)
    ]
