"""The instruction and the negative prompts are encoded once, not with every prompt again."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sana_jax.models.text_encoder import TextEncoderConfig, TextPrefix, prefix_shapes
from sana_jax.sampling import program
from sana_jax.sampling.compiled import Programs


class TextCache:
    """What the text encoder made of the last instruction, and of the last negative prompts.

    Both are computed anew when the tokens or any of the encoder's parameters are others; parameters are told apart as
    objects, which is exact for JAX arrays, since these never change.
    """

    def __init__(self, programs: Programs):
        self._programs = programs
        self._known = [], {}  # the encoder's parameters; program -> (tokens, what came of them)

    def prefix(self, params: dict, ids: Int[np.ndarray, " P"]) -> TextPrefix:
        """The encoder's state after the tokens of an instruction."""
        return self._once(program.encode_prefix, params, ids)

    def hidden(self, params: dict, ids: Int[np.ndarray, "P N"], mask: Int[np.ndarray, "P N"]) -> Float[Array, "P N D"]:
        """Hidden states of negative prompts."""
        return self._once(program.encode_text, params, ids, mask)

    def _once(self, function: Callable, params: dict, *tokens: np.ndarray):
        name, leaves = function.__name__, jax.tree.leaves(params)
        encoder, last = self._known
        if not _same_objects(leaves, encoder):
            last = {}
            self._known = leaves, last
        known = last.get(name)
        if known is None or not _equal(tokens, known[0]):
            known = last[name] = tokens, self._programs(function, params, *tokens)
        return known[1]


class TextShapes:
    """Stands in for a `TextCache` while parameters are only shapes: its programs are compiled, shapes are their results."""

    def __init__(self, programs: Programs, config: TextEncoderConfig):
        self._programs, self._config = programs, config

    def prefix(self, params: dict, ids: Int[np.ndarray, " P"]) -> TextPrefix:
        self._programs.compile(program.encode_prefix, params, ids)
        return prefix_shapes(self._config, len(ids))

    def hidden(self, params: dict, ids: Int[np.ndarray, "P N"], mask: Int[np.ndarray, "P N"]) -> jax.ShapeDtypeStruct:
        self._programs.compile(program.encode_text, params, ids, mask)
        return jax.ShapeDtypeStruct((*ids.shape, self._config.hidden_size), jnp.dtype(self._config.dtype))


def _equal(first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...]) -> bool:
    return all(map(np.array_equal, first, second))


def _same_objects(first: list, second: list) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
