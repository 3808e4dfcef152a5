"""What the training loop has to know of what it trains."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from sana_jax.training.state import PyTree


class Task(NamedTuple):
    """One thing to train, as functions; made by `make_autoencoder_task` and `make_text_to_image_task`.

    Attributes:
      init: key -> parameters; traced, so that large models are born sharded.
      load_initial: shardings of the parameters -> parameters to start from in place of `init`'s; None: start at random.
      frozen: shapes and dtypes of what the loss reads and nothing trains: weights, and what is computed of them once.
      load_frozen: shardings of `frozen` -> those arrays.
      prepare: the loader's batch (pictures of any size that the config has, captions) -> the arrays of a step, all with a
        leading batch axis.
      prepare_heldout: the same for the held-out batch that `show` and `measure` are given.
      loss: (params, frozen, batch, keys, step) -> (scalar, metrics, "loss" among them), means over the batch. Each
        picture has a random key of its own, so that a part of a batch draws what the whole would.
      picture_flops: (height, width) -> model operations of one such picture in a training step (`sana_jax.flops`).
      show: (params, frozen, held-out batch) -> (pictures [n, H, W, 3] in -1..1, metrics on that batch). It is of
        `config.sample.split`, and so held out unless that says "train".
      columns: of the picture grid.
      measure: (params, held-out batch) -> numbers that the exported model's config needs.
      export: (averaged parameters on the host, folder, those numbers, the folder that the same process wrote before or
        None) writes a folder in diffusers layout, of an `Adapter` that alone. What no training changes is taken from the one
        before.
    """

    init: Callable[[jax.Array], PyTree]
    load_initial: Callable[[PyTree], PyTree] | None
    frozen: PyTree
    load_frozen: Callable[[PyTree], PyTree]
    prepare: Callable[[dict], dict[str, np.ndarray]]
    prepare_heldout: Callable[[dict], dict[str, np.ndarray]]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    picture_flops: Callable[[int, int], int]
    show: Callable[[PyTree, PyTree, dict], tuple[jax.Array, dict[str, jax.Array]]]
    columns: int
    measure: Callable[[PyTree, dict], dict[str, jax.Array]]
    export: Callable[[PyTree, pathlib.Path, dict, pathlib.Path | None], None]
