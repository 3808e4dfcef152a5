"""Muon for the matrices of a model, Adam for everything else (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982)."""

import math

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from sana_jax.parallel.sharding import is_scanned, path_names

MOMENTUM = 0.95
# Three iterations after "almost orthogonal layer" scaling do what five do after division by the norm (arXiv 2512.04632).
ITERATIONS = 3

# Depthwise kernels are no matrices: every channel has its own. Layers that meet the latents fare better with Adam, as
# embeddings and heads do.
_ADAM = ("depthwise", "patch_embed", "proj_out")
_NARROW = 16  # a kernel with fewer inputs or outputs meets the picture's channels


def scale_by_muon_and_adam(
    rms: float, adam_b1: float, adam_b2: float, *, adam_eps: float = 1e-8
) -> optax.GradientTransformation:
    r"""Directions, to be scaled by minus the learning rate.

    With G the momentum of a matrix's gradient and $G = U S V^T$, [m, n]: the direction is about
    $\sqrt{\max(m, n)} \, \mathrm{rms} \cdot U V^T$, whose root mean square is at most `rms` for every shape.

    Args:
      rms: of a matrix's direction; 0.2 is about what Adam's directions have.
      adam_b1, adam_b2, adam_eps: for what is no matrix.
    """
    muon = optax.chain(
        scale_by_muon(
            ns_steps=ITERATIONS,
            beta=MOMENTUM,
            preconditioning="aol",
            weight_dimension_numbers=dimension_numbers,
        ),
        optax.stateless(lambda updates, _: to_rms(updates, rms)),
    )
    adam = optax.scale_by_adam(adam_b1, adam_b2, eps=adam_eps)
    return optax.partition({"muon": muon, "adam": adam}, labels)


def to_rms(directions, rms: float):
    r"""Orthogonal matrices [m, n], whose root mean square is $1/\sqrt{\max(m, n)}$, scaled to `rms`."""

    def scaled(path, x):
        axes = matrix_axes(path, x)
        sides = (math.prod(x.shape[axis] for axis in side) for side in axes)
        return x * (rms * math.sqrt(max(sides)))

    return jax.tree_util.tree_map_with_path(scaled, directions)


def labels(params):
    """ "muon" or "adam" for every parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, x: "adam" if matrix_axes(path, x) is None else "muon", params)


def matrix_axes(path, x) -> MuonDimensionNumbers | None:
    """Which axes of a parameter are a matrix's inputs and outputs; None for what Adam takes.

    Dense kernels are [in, out], several in one [in, count, out], convolutions [k, k, in, out]; scanned layers have one
    more axis in front. Each layer and each of several is a matrix of its own.
    """
    names = path_names(path)
    if names[-1] != "kernel" or any(name in _ADAM for name in names):
        return None
    first, last = (1 if is_scanned(path) else 0), x.ndim - 1
    inputs = tuple(range(first, last)) if last - first == 3 else (first,)
    if min(x.shape[inputs[-1]], x.shape[last]) < _NARROW:
        return None
    return MuonDimensionNumbers(reduction_axis=inputs, output_axis=(last,))


def dimension_numbers(params):
    """`matrix_axes` of the parameters that `labels` gives to Muon."""
    return jax.tree_util.tree_map_with_path(matrix_axes, params)
