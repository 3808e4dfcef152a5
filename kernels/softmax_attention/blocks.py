r"""Softmax attention and its derivative block by block: a loop over groups of heads, within it over some queries at a time.

For CPUs, where the logits of all heads would be written to new memory and read from there several times, and products of many
small matrices with far operands run at a tenth of the speed.

With $w = e^{s - \max s}$, $s = q k^T / \sqrt{d} + m$, $z = \sum_l w_l$ and $y = w v / z$, a gradient g of y gives

    $dv = w^T (g / z)$,   $dw = (g / z)\,v^T$,   $ds = w\,(dw - \sum_l w_l dw_l / z)$,   $dq = ds\,k / \sqrt{d}$,   $dk = ds^T q / \sqrt{d}$,

so that what has the size of the logits is never divided. In the forward pass z comes with the product, from a column of ones
beside the values.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float
from sana_jax.kernels.softmax_attention.reference import MASKED

LOGITS = 2**19  # of a block: 2 MB
WINDOW = 32  # values that XLA reduces without windows


def softmax_attention(
    q: Float[Array, "B N C"],
    k: Float[Array, "B L C"],
    v: Float[Array, "B L C"],
    mask: Bool[Array, "B L"] | None = None,
    *,
    heads: int,
) -> Float[Array, "B N C"]:
    """As the reference."""
    split = _Blocks(q, k, heads)

    def group(arrays):
        k, v, bias, q = arrays
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)

        def block(q):
            y = _product("gnl,gld->gnd", _weights(q, k, bias).astype(v.dtype), v)
            return (y[..., :-1] / y[..., -1:]).astype(q.dtype)

        return lax.map(block, q)

    keys = split.keys(k), split.keys(v), split.bias(mask)
    return split.join_queries(lax.map(group, (*keys, split.queries(q))))


def softmax_attention_vjp(q, k, v, mask, g, *, heads: int) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v."""
    split = _Blocks(q, k, heads)

    def group(arrays):
        k, v, bias, q, g = arrays

        def block(sums, queries):
            q, g = queries
            weights = _weights(q, k, bias)
            total = _product("gnl,l->gn", weights, jnp.ones(k.shape[1]))[..., None]
            g = (g / total).astype(g.dtype)
            dweights = _product("gnd,gld->gnl", g, v)
            dots = _reduce(jnp.add, lambda of: weights[..., of] * dweights[..., of], k.shape[1]) / total
            dlogits = (weights * (dweights - dots) * _scale(q)).astype(q.dtype)
            dv = _product("gnl,gnd->gld", weights.astype(v.dtype), g)
            dk = _product("gnl,gnd->gld", dlogits, q)
            return (sums[0] + dk, sums[1] + dv), _product("gnl,gld->gnd", dlogits, k).astype(q.dtype)

        zeros = jnp.zeros(k.shape, jnp.float32)
        (dk, dv), dq = lax.scan(block, (zeros, zeros), (q, g))
        return dq, dk.astype(k.dtype), dv.astype(v.dtype)

    keys = split.keys(k), split.keys(v), split.bias(mask)
    dq, dk, dv = lax.map(group, (*keys, split.queries(q), split.queries(g)))
    return split.join_queries(dq), split.join_keys(dk), split.join_keys(dv)


class _Blocks:
    """How arrays are cut: heads of all pictures into groups, queries into chunks, with padding behind the last."""

    def __init__(self, q, k, heads: int):
        self.batch, self.tokens, self.heads = *q.shape[:2], heads
        chunks = -(-self.tokens * k.shape[1] // LOGITS)
        self.chunk = -(-self.tokens // chunks)
        # A batch of any size, as exported programs have it, has groups within a picture.
        rows = self.batch * heads if isinstance(self.batch, int) else heads
        limit = max(1, LOGITS // (self.chunk * k.shape[1]))
        self.group = next(size for size in range(min(rows, limit), 0, -1) if rows % size == 0)

    def keys(self, x: Float[Array, "B L C"]) -> Float[Array, "groups G L D"]:
        x = x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)
        return x.reshape(-1, self.group, *x.shape[2:])

    def queries(self, x: Float[Array, "B N C"]) -> Float[Array, "groups chunks G n D"]:
        padded = jnp.pad(x, ((0, 0), (0, -self.tokens % self.chunk), (0, 0)))
        x = self.keys(padded)
        return x.reshape(*x.shape[:2], -1, self.chunk, x.shape[-1]).swapaxes(1, 2)

    def bias(self, mask: Bool[Array, "B L"] | None) -> Float[Array, "groups G 1 L"]:
        if mask is None:
            return jnp.zeros((self.batch * self.heads // self.group, 1, 1, 1))
        bias = jnp.repeat(jnp.where(mask, 0.0, MASKED), self.heads, axis=0)
        return bias.reshape(-1, self.group, 1, mask.shape[-1])

    def join_keys(self, x: Float[Array, "groups G L D"]) -> Float[Array, "B L C"]:
        x = x.reshape(self.batch, self.heads, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(*x.shape[:2], -1)

    def join_queries(self, x: Float[Array, "groups chunks G n D"]) -> Float[Array, "B N C"]:
        x = x.swapaxes(1, 2)
        return self.join_keys(x.reshape(*x.shape[:2], -1, x.shape[-1]))[:, : self.tokens]


def _product(indices, a, b):
    return jnp.einsum(indices, a, b, preferred_element_type=jnp.float32)


def _weights(
    q: Float[Array, "G n D"], k: Float[Array, "G L D"], bias: Float[Array, "#G 1 #L"]
) -> Float[Array, "G n L"]:
    """Exponentials of the logits less their maximum."""
    products, scale = _product("gnd,gld->gnl", q, k), _scale(q)
    bias = jnp.broadcast_to(bias, (*bias.shape[:-1], k.shape[1]))
    largest = _reduce(jnp.maximum, lambda of: products[..., of] * scale + bias[..., of], k.shape[1])
    return jnp.exp(products * scale + bias - largest)


def _scale(q):
    return q.shape[-1] ** -0.5


def _reduce(op: jnp.ufunc, term: Callable[[slice], Float[Array, "G n l"]], length: int) -> Float[Array, "G n 1"]:
    """`op` over the columns of a term, of which `term` gives a slice.

    XLA makes windows of a reduction of more than 32 values, in code that took five times as long as this: slices are put together
    element by element, and only the columns of the last one are reduced.
    """
    if length <= WINDOW:
        return op.reduce(term(slice(length)), axis=-1, keepdims=True)
    size = max(WINDOW // 2, length // WINDOW)
    *starts, rest = range(0, length + 1, size)
    folded = functools.reduce(op, [term(slice(start, start + size)) for start in starts])
    total = _reduce(op, lambda of: folded[..., of], size)
    if rest == length:
        return total
    return op(total, op.reduce(term(slice(rest, length)), axis=-1, keepdims=True))
