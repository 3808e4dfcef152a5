"""A training run before any of its arrays exists: shapes, places, and the compiled step."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax.checkpoint import Checkpoints
from sana_jax.compiler_options import compiler_options
from sana_jax.data.loader import Batch
from sana_jax.parallel import sharding
from sana_jax.training.optimizers import eight_bit
from sana_jax.training.optimizers.recipe import make_optimizer
from sana_jax.training.state import PyTree, TrainState, init_state
from sana_jax.training.step import make_step
from sana_jax.training.task import Task


class TrainProgram(NamedTuple):
    """What training and compiling ahead of time have in common.

    Attributes:
      state: the state's shapes, each with the sharding that it has between steps.
      frozen: shapes and shardings of the weights that do not train.
      from_key: key -> state; jit it with the shardings of `state`, so that nothing is ever whole on one device.
      from_params: parameters -> state before the first update; likewise.
      step: the jitted step, (state, frozen, batch) -> (state, metrics). It takes the state's memory for the new one.
      show: `task.show`, jitted.
    """

    state: TrainState
    frozen: PyTree
    from_key: Callable[[jax.Array], TrainState]
    from_params: Callable[[PyTree], TrainState]
    step: Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, jax.Array]]]
    show: Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, dict[str, jax.Array]]]


def make_program(config, task: Task, mesh: Mesh) -> TrainProgram:
    """The program that `config` describes for this task and mesh; nothing is computed.

    Raises:
      ValueError: the optimizer is unknown, or the mesh cannot split the model.
    """
    tx, schedule = make_optimizer(config.optimizer, config.train.num_steps)

    def from_params(params: PyTree) -> TrainState:
        return init_state(params, tx, with_ema=config.ema.decay > 0)

    def from_key(key: jax.Array) -> TrainState:
        return from_params(task.init(key))

    shapes = jax.eval_shape(from_key, jax.eval_shape(lambda: jax.random.key(config.seed)))
    state = sharding.placed(shapes, mesh)
    everywhere, options = NamedSharding(mesh, P()), compiler_options(mesh.devices.flat[0].platform)
    step = jax.jit(
        make_step(
            task.loss,
            tx,
            schedule,
            seed=config.seed,
            decay=config.ema.decay,
            accumulate=config.train.accumulate_steps,
            skip_nonfinite=config.train.skip_nonfinite > 0,
        ),
        donate_argnums=0,
        out_shardings=(sharding.places(state), everywhere),
        compiler_options=options,
    )
    show = jax.jit(task.show, out_shardings=everywhere, compiler_options=options)
    return TrainProgram(state, sharding.placed(task.frozen, mesh), from_key, from_params, step, show)


def example_batch(count: int, size: tuple[int, int]) -> Batch:
    """What a loader gives, of so many black pictures."""
    return {
        "images": np.zeros((count, *size, 3), np.uint8),
        "controls": np.zeros((count, *size, 3), np.uint8),
        "size": size,
        "captions": ["a"] * count,
        "keys": [""] * count,
        "indices": np.zeros(count, np.int32),
        "backgrounds": [""] * count,
    }


def abstract_batch(config, task: Task, mesh: Mesh, size: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and places of the arrays of a step on pictures of this size."""
    place = NamedSharding(mesh, sharding.BATCH)

    def abstract(x):
        return jax.ShapeDtypeStruct((config.data.batch_size, *x.shape[1:]), x.dtype, sharding=place)

    return jax.tree.map(abstract, task.prepare(example_batch(1, size)))


def restore_state(
    checkpoints: Checkpoints, before: str, config, task: Task, mesh: Mesh, wanted: TrainState
) -> TrainState:
    """The newest state that can be read, placed and in the form that `wanted` says.

    Args:
      before: optimizer.name of the run that saved; another than the config's is the other form of the same optimizer
        (`check_resumable`), whose state is restored as it is and then turned into the config's.
      wanted: `state` of the config's program.
    """
    now = config.optimizer.name
    if before == now:
        return checkpoints.restore(wanted)
    config = copy.deepcopy(config)
    config.optimizer.name = before
    state = checkpoints.restore(make_program(config, task, mesh).state)
    change = eight_bit.encode if now.endswith("8bit") else eight_bit.decode
    logging.info("the optimizer's state is turned from %s into %s", before, now)
    convert = jax.jit(
        lambda state: state._replace(opt_state=change(state.opt_state)),
        donate_argnums=0,
        out_shardings=sharding.places(wanted),
    )
    return convert(state)
