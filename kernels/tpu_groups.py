"""What TPU kernels share that work on small groups of channels, as the heads of an attention.

Groups of D channels would fill a fraction of the 128 lanes of a register, so they are never split: 128 / D lie side by side, and
one product serves them all, with a matrix of 128 x 128 that has their D x D blocks on its diagonal.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

LANES = 128

ROWS_BY_COLUMNS, ROWS_BY_ROWS, COLUMNS_BY_COLUMNS = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # contracted axes


def same_group(size: int) -> Bool[Array, "128 128"]:
    """True in the blocks."""
    row, column = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    return row // size == column // size


def unfold(ref, mask: Bool[Array, "128 128"]) -> Float[Array, "128 128"]:
    """Every group's [D, D] in its lanes, as a matrix with these blocks on its diagonal, float32."""
    copies = jnp.concatenate([ref[...].astype(jnp.float32)] * (LANES // ref.shape[0]), axis=0)
    return jnp.where(mask, copies, 0)


def fold(matrix: Float[Array, "128 128"], mask: Bool[Array, "128 128"], size: int) -> Float[Array, "D 128"]:
    """The blocks on the diagonal, each in its lanes: the inverse of `unfold`."""
    blocks = jnp.where(mask, matrix, 0)
    return sum(blocks[start : start + size] for start in range(0, LANES, size))


def product(a, b, dtype, contracted=ROWS_BY_COLUMNS):
    """Sums in float32 of the products of factors rounded to `dtype`."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    a, b = a.astype(dtype), b.astype(dtype)
    return lax.dot_general(a, b, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32)
