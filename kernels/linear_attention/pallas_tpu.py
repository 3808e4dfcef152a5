r"""ReLU linear attention on TPUs (Mosaic): q, k and v are read once and o is written once, forward and backward alike.

Per head, with $\phi = \mathrm{ReLU}$ and the state $S = \sum_m \phi(k_m) v_m^T$, $z = \sum_m \phi(k_m)$,

$$o_n = S^T\phi(q_n) / d_n, \qquad d_n = z\cdot\phi(q_n) + \epsilon.$$

With $\dot x$ for the gradient of x, $g_n = \dot o_n / d_n$ and $h_n = -g_n\cdot o_n$, the chain rule gives

$$\dot\phi(q_n) = S g_n + h_n z, \quad \dot S = \sum_n \phi(q_n) g_n^T, \quad \dot z = \sum_n h_n \phi(q_n), \quad
  \dot\phi(k_m) = \dot S v_m + \dot z, \quad \dot v_m = \dot S^T \phi(k_m),$$

and $\dot q$ and $\dot k$ are $\dot\phi$ where q and k are positive. So there are four kernels: `state` reads k and v, `apply` reads q, and
their derivatives read the same again with $\dot o$. Between them pass S and z alone, which tokens on several devices add up.

The arithmetic is 0.2 % of the model's; what counts is how the bytes lie. A kernel works on the heads that share 128 lanes
(`tpu_groups`). A sum over a head's channels is a product with ones in their blocks, which leaves it in each of the head's lanes. S is
kept as [D, C], every head's matrix in its own lanes, so that no memory goes to lanes without contents either.

Blocks that reach beyond the last token or channel hold whatever the memory held, NaN for instance, and 0 * NaN is NaN. What
enters a product is therefore selected first, by `_Group.load` and `_Group.unfold`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float
from sana_jax.kernels.linear_attention.state import LinearAttentionState
from sana_jax.kernels.tpu_groups import COLUMNS_BY_COLUMNS, LANES, ROWS_BY_ROWS, fold, product, same_group, unfold

# Tokens and channels brought to the chip at a time: large transfers, of which the derivative of `apply` holds six in float32
# (4.5 MB) next to its intermediate values. The widths 1152 and 2240 fill three and six such blocks.
BLOCK_TOKENS, BLOCK_CHANNELS = 512, 3 * LANES


def refusal(*arrays: Float[Array, "B N C"], head_dim: int) -> str | None:
    """Why these kernels cannot work on arrays of tokens, or None where they can."""
    dtypes = {x.dtype for x in arrays}
    if LANES % head_dim or head_dim < 8:
        return f"head_dim={head_dim} is not one of 8, 16, 32, 64, 128, which fill {LANES} lanes"
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype("float32"), jnp.dtype("bfloat16")}:
        return f"its arrays are {', '.join(sorted(map(str, dtypes)))}; all must be float32, or all bfloat16"
    if arrays[0].shape[-1] < LANES:
        return f"{arrays[0].shape[-1]} channels are fewer than {LANES} lanes"
    if not all(isinstance(n, int) for x in arrays for n in x.shape):
        return f"the shape {arrays[0].shape} is symbolic (jax.export), and a kernel's grid is made of numbers"
    return None


@functools.partial(jax.jit, static_argnames="head_dim")  # traced once for all layers, on every platform
def state(k: Float[Array, "B M C"], v: Float[Array, "B M C"], *, head_dim: int) -> LinearAttentionState:
    """First half: the sums over the tokens."""
    return _unpack(*_call(_state_kernel, (k, v), None, head_dim=head_dim, products=1, reduces=True))


@functools.partial(jax.jit, static_argnames="eps")
def apply(q: Float[Array, "B N C"], state: LinearAttentionState, *, eps: float) -> Float[Array, "B N C"]:
    """Second half: each query reads the state."""
    kernel = functools.partial(_apply_kernel, eps=eps)
    return _call(kernel, (q,), state, products=2, results=1)[0]


@functools.partial(jax.jit, static_argnames="eps")
def apply_vjp(
    q: Float[Array, "B N C"], state: LinearAttentionState, g: Float[Array, "B N C"], *, eps: float
) -> tuple[Float[Array, "B N C"], LinearAttentionState]:
    """Gradients of q and of the state, given that of the result."""
    kernel = functools.partial(_apply_vjp_kernel, eps=eps)
    dq, *gradients = _call(kernel, (q, g), state, products=5, results=1, reduces=True)
    return dq, _unpack(*gradients)


@jax.jit
def state_vjp(
    k: Float[Array, "B M C"], v: Float[Array, "B M C"], g: LinearAttentionState
) -> tuple[Float[Array, "B M C"], Float[Array, "B M C"]]:
    """Gradients of k and v, given that of the state."""
    dk, dv = _call(_state_vjp_kernel, (k, v), g, products=2, results=2)
    return dk, dv


class _Group(NamedTuple):
    """The heads that share 128 lanes, over the tokens of one block.

    Attributes:
      head_dim: D.
      tokens: how many of the block's tokens there are, None where it is all.
      channels: how many of the lanes are channels, None where it is all.
      first: whether the block is the sequence's first.
    """

    head_dim: int
    tokens: Array | None
    channels: Array | None
    first: Array

    def load(self, ref, *, tokens: bool = True) -> Float[Array, "N 128"]:
        """What the array holds, in float32, and zeros outside of it."""
        x = ref[...].astype(jnp.float32)
        for axis, size in enumerate((self.tokens if tokens else None, self.channels)):
            if size is not None:
                x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, axis) < size, x, 0)
        return x

    def same_head(self) -> Bool[Array, "128 128"]:
        """True in the blocks of the heads there are."""
        mask = same_group(self.head_dim)
        if self.channels is None:
            return mask
        return mask & (lax.broadcasted_iota(jnp.int32, mask.shape, 1) < self.channels)

    def unfold(self, ref) -> Float[Array, "128 128"]:
        """The heads' [D, D] on the diagonal."""
        return unfold(ref, self.same_head())

    def fold(self, matrix: Float[Array, "128 128"]) -> Float[Array, "D 128"]:
        """The inverse of `unfold`."""
        return fold(matrix, self.same_head(), self.head_dim)

    def sum_channels(self, x: Float[Array, "N 128"], dtype) -> Float[Array, "N 128"]:
        """Of each head, the sum over its channels, in all of its lanes."""
        return product(x, self.same_head().astype(jnp.float32), dtype)

    def add(self, ref, x) -> None:
        """Adds up over the blocks of the sequence."""
        ref[...] = jnp.where(self.first, 0, ref[...]) + x


def _state_kernel(group: _Group, k_ref, v_ref, s_ref, z_ref):
    phi, v = jnp.maximum(group.load(k_ref), 0), group.load(v_ref)
    group.add(s_ref, group.fold(product(phi, v, k_ref.dtype, COLUMNS_BY_COLUMNS)))
    group.add(z_ref, phi.sum(0, keepdims=True))


def _apply_kernel(group: _Group, q_ref, s_ref, z_ref, o_ref, *, eps):
    phi = jnp.maximum(group.load(q_ref), 0)
    d = group.sum_channels(phi * group.load(z_ref, tokens=False), q_ref.dtype) + eps
    o_ref[...] = (product(phi, group.unfold(s_ref), q_ref.dtype) / d).astype(o_ref.dtype)


def _apply_vjp_kernel(group: _Group, q_ref, do_ref, s_ref, z_ref, dq_ref, ds_ref, dz_ref, *, eps):
    dtype = q_ref.dtype
    q, do = group.load(q_ref), group.load(do_ref)
    s, z = group.unfold(s_ref), group.load(z_ref, tokens=False)
    phi = jnp.maximum(q, 0)
    d = group.sum_channels(phi * z, dtype) + eps
    o, g = product(phi, s, dtype) / d, do / d
    h = -group.sum_channels(g * o, dtype)
    dq_ref[...] = jnp.where(q > 0, product(g, s, dtype, ROWS_BY_ROWS) + h * z, 0).astype(dq_ref.dtype)
    group.add(ds_ref, group.fold(product(phi, g, dtype, COLUMNS_BY_COLUMNS)))
    group.add(dz_ref, (phi * h).sum(0, keepdims=True))


def _state_vjp_kernel(group: _Group, k_ref, v_ref, ds_ref, dz_ref, dk_ref, dv_ref):
    k, v, ds = group.load(k_ref), group.load(v_ref), group.unfold(ds_ref)
    dphi = product(v, ds, k_ref.dtype, ROWS_BY_ROWS) + group.load(dz_ref, tokens=False)
    dk_ref[...] = jnp.where(k > 0, dphi, 0).astype(dk_ref.dtype)
    dv_ref[...] = product(jnp.maximum(k, 0), ds, k_ref.dtype).astype(dv_ref.dtype)


def _call(
    kernel: Callable,
    tokens: tuple[Float[Array, "B N C"], ...],
    state: LinearAttentionState | None,
    *,
    products: int,
    head_dim: int | None = None,
    results: int = 0,
    reduces: bool = False,
) -> tuple[Array, ...]:
    """Runs a kernel on every group of heads and block of tokens.

    Args:
      kernel: takes a `_Group` and refs of `tokens`, the state, the results over tokens and the results of its sums.
      tokens: arrays of one shape and dtype.
      state: what every token sees.
      products: of [N, 128] and 128 x 128 that the kernel computes for a group.
      head_dim: D, where there is no state.
      results: arrays over tokens that it writes.
      reduces: whether it sums over tokens, into arrays like a state's.
    """
    batch, length, channels = tokens[0].shape
    head_dim = head_dim or state.kv.shape[-1]
    rows, lanes = min(BLOCK_TOKENS, length), min(BLOCK_CHANNELS, pl.cdiv(channels, LANES) * LANES)
    token = pl.BlockSpec((None, rows, lanes), lambda b, c, n: (b, n, c))
    per_head = tuple(pl.BlockSpec((None, size, lanes), lambda b, c, n: (b, 0, c)) for size in (head_dim, 1))
    sums = tuple(jax.ShapeDtypeStruct((batch, size, channels), jnp.float32) for size in (head_dim, 1))
    operands = (*tokens, *(() if state is None else _pack(state)))
    out_shape = (jax.ShapeDtypeStruct(tokens[0].shape, tokens[0].dtype),) * results + sums * reduces

    def on_block(*refs):
        block, first = pl.program_id(2), pl.program_id(2) == 0
        for start in range(0, lanes, LANES):
            group = _Group(
                head_dim,
                tokens=length - block * rows if length % rows else None,
                channels=channels - pl.program_id(1) * lanes - start if channels % LANES else None,
                first=first,
            )
            kernel(group, *(ref.at[:, pl.ds(start, LANES)] for ref in refs))

    return pl.pallas_call(
        on_block,
        grid=(batch, pl.cdiv(channels, lanes), pl.cdiv(length, rows)),
        in_specs=(token,) * len(tokens) + per_head * (state is not None),
        out_specs=(token,) * results + per_head * reduces,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary" if reduces else "parallel")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * batch * length * channels * LANES,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in operands + out_shape),
            transcendentals=0,
        ),
        name=f"linear_attention{getattr(kernel, 'func', kernel).__name__.removesuffix('_kernel')}",
    )(*operands)


def _pack(state: LinearAttentionState) -> tuple[Float[Array, "B D C"], Float[Array, "B 1 C"]]:
    batch, heads, d, _ = state.kv.shape
    return state.kv.transpose(0, 2, 1, 3).reshape(batch, d, heads * d), state.k_sum.reshape(batch, 1, heads * d)


def _unpack(kv: Float[Array, "B D C"], k_sum: Float[Array, "B 1 C"]) -> LinearAttentionState:
    batch, d, channels = kv.shape
    heads = channels // d
    return LinearAttentionState(kv.reshape(batch, d, heads, d).transpose(0, 2, 1, 3), k_sum.reshape(batch, heads, d))
