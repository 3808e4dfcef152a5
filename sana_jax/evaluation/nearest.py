"""Memory or invention: how near pictures lie to the nearest picture of the training set."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Nearest(NamedTuple):
    """The nearest training picture of each of N pictures.

    Attributes:
      distance: cosine distance of the features, 0..2.
      index: which training picture it is.
    """

    distance: Float[np.ndarray, " N"]
    index: Int[np.ndarray, " N"]


def nearest(features: Float[np.ndarray, "N D"], training: Float[np.ndarray, "M D"]) -> Nearest:
    """Finds the training picture whose features point in the most similar direction, after the training mean is taken off.

    A set of copies has distances near 0; a set of new drawings by the same hand has those of real held-out drawings.
    """
    mean = training.mean(axis=0)
    similarity = unit(features - mean) @ unit(training - mean).T
    index = similarity.argmax(axis=1)
    return Nearest(1 - similarity[np.arange(len(index)), index], index)


def unit(x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """The rows at length 1; rows of zeros stay so."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
