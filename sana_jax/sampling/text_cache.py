"""The complex human instruction is encoded once, not before every prompt again."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Int

from sana_jax.models.text_encoder import TextEncoder, TextPrefix


class InstructionCache:
    """Keys and values of the last instruction that was encoded.

    They are computed anew when the instruction, the encoder or any of its parameters is another; parameters are told
    apart as objects, which is exact for JAX arrays, since these never change.
    """

    def __init__(self):
        self._key: tuple | None = None
        self._prefix: TextPrefix | None = None

    def __call__(self, encoder: TextEncoder, params: dict, ids: Int[np.ndarray, " P"]) -> TextPrefix:
        """The encoder's state after the tokens `ids`."""
        leaves = jax.tree.leaves(params)
        key = (encoder, ids.tobytes())
        if self._key is None or key != self._key[0] or not _same_objects(leaves, self._key[1]):
            self._prefix = _encode(encoder, params, ids)
            self._key = key, leaves
        return self._prefix

    def shapes(self, encoder: TextEncoder, params: dict, ids: Int[np.ndarray, " P"]) -> TextPrefix:
        """Shapes of what a call gives, of parameters that may be shapes too."""
        return jax.eval_shape(functools.partial(_encode, encoder), params, ids)


@functools.partial(jax.jit, static_argnames="encoder")
def _encode(encoder: TextEncoder, params: dict, ids: Int[Array, " P"]) -> TextPrefix:
    return encoder.apply({"params": params}, ids, method="encode_prefix")


def _same_objects(first: list, second: list) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
