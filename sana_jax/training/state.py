"""What a training run carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class TrainState(NamedTuple):
    """Everything that changes; randomness and the position in the data follow from `step` alone.

    Attributes:
      step: batches seen so far, and the number of the next. Where updates may be skipped, the optimizer counts those made.
      params: master weights, fp32.
      ema: running average of the weights; an empty dict where the config asks for none.
      opt_state: of the optax transformation.
    """

    step: jax.Array
    params: PyTree
    ema: PyTree
    opt_state: optax.OptState

    def averaged(self) -> PyTree:
        """The weights to sample with and to export: the average where there is one."""
        return self.ema or self.params

    def updates_made(self) -> jax.Array:
        """What the learning rate's schedule has counted; `step` for an optimizer without a schedule."""
        return optax.tree.get(self.opt_state, "count", self.step, filtering=_of_schedule)


def _of_schedule(path: tuple, _) -> bool:
    return getattr(path[-1], "tuple_name", None) == optax.ScaleByScheduleState.__name__


def init_state(params: PyTree, tx: optax.GradientTransformation, *, with_ema: bool) -> TrainState:
    """State before the first update. The average is a copy, so that donating the state frees neither twice."""
    ema = jax.tree.map(jnp.copy, params) if with_ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params))
