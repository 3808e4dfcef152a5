"""Backward passes of our own, and how they stand aside for forward mode.

`jax.custom_vjp` makes a function that `jax.jvp` cannot differentiate. Of those made here it can, within `forward_mode`: they are
then the plain operations that their values are computed with, and kernels give way to XLA's operations.
"""

import functools
from collections.abc import Callable, Sequence

import jax

# Part of the key of JAX's caches, so that nothing traced outside is taken inside or the other way round.
_FORWARD_MODE = jax.make_user_context(False)


def forward_mode():
    """A context within which our functions and models have derivatives in forward mode (`jax.jvp`, `jax.linearize`).

    What is traced in it is differentiated backwards by JAX's own rules, slower and with more memory than outside.
    """
    return _FORWARD_MODE(True)


def in_forward_mode() -> bool:
    """Whether what is traced now is within `forward_mode`."""
    return bool(_FORWARD_MODE.value)


def custom_vjp(function: Callable, nondiff_argnums: Sequence[int] = ()) -> Callable:
    """As `jax.custom_vjp`, and in `forward_mode` the function itself."""
    own = jax.custom_vjp(function, nondiff_argnums=tuple(nondiff_argnums))

    @functools.wraps(function)
    def call(*args, **options):
        return function(*args, **options) if in_forward_mode() else own(*args, **options)

    call.defvjp = own.defvjp
    return call
