"""What passes between the two halves of linear attention."""

from typing import NamedTuple

from jaxtyping import Array, Float


class LinearAttentionState(NamedTuple):
    """What the keys and values of a sequence amount to. States of token shards add up (`psum` over the shards)."""

    kv: Float[Array, "B H D D"]  # sum over tokens of relu(k) v^T
    k_sum: Float[Array, "B H D"]  # sum over tokens of relu(k)
