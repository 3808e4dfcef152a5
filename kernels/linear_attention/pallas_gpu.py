r"""ReLU linear attention on Hopper GPUs (Mosaic GPU), in bfloat16: q, k and v are read once and o is written once.

The formulas are those of `pallas_tpu`: four kernels, `state` and `apply` and the derivative of each, between which the state passes.

A block of the grid takes 64 channels, which are whole heads, and a part of the tokens, in tiles of 64 x 64 that the copy
engine (TMA) brings and stores. All arithmetic but the division is products of such tiles on the tensor cores (`wgmma`, sums
in float32). A product of 64 channels by 64 mixes heads; what mixes is zero where the state enters a product, and dropped
where it comes out: with matrices $S$ and $Z$ of 64 x 64 that hold, as blocks on their diagonals, $S$ of each head and $z_c$ in
every column of c's head,

$$o = \phi S / d, \quad d = \phi Z + \epsilon, \quad g = \dot o / d, \quad t = g \cdot o, \quad
  \dot\phi = g S^T - t Z^T, \quad \dot S = \phi^T g, \quad \dot z = -\,\mathrm{rowsum}(\phi^T t).$$

XLA makes the matrices out of the state, adds up the sums that the parts of the tokens gave, and takes the blocks of $S$ out
of them. Beyond the last token the copy engine reads zeros and stores nothing.

Timed on an H200 by `benchmarks/gpu_layers.py`: README, "Speed".
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Bool, Float
from sana_jax.kernels.choice import has_gpu
from sana_jax.kernels.linear_attention.state import LinearAttentionState

TILE = 64  # rows of a wgmma, and 128 bytes of bfloat16, which is the widest swizzle
ROWS = 8  # that a tile is copied by; arrays must have a multiple of them
BUFFERS = 4  # tiles of each array on their way
BLOCKS = 132  # of the grid at least, where the tokens suffice: one on each multiprocessor of an H100

_SEMANTICS = plgpu.LoweringSemantics.Warpgroup
_LAYOUT = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128))


def refusal(*arrays: Float[Array, "B N C"], head_dim: int) -> str | None:
    """Why these kernels cannot work on arrays of tokens, or None where they can."""
    dtypes = sorted({str(x.dtype) for x in arrays})
    if dtypes != ["bfloat16"]:
        return f"its arrays are {', '.join(dtypes)}; a GPU's tensor cores round float32, so that all must be bfloat16"
    if TILE % head_dim:
        return f"head_dim={head_dim} does not divide {TILE}, the channels of a tile"
    if arrays[0].shape[-1] % TILE:
        return f"{arrays[0].shape[-1]} channels are not whole tiles of {TILE}"
    if not all(isinstance(n, int) for x in arrays for n in x.shape):
        return f"the shape {arrays[0].shape} is symbolic (jax.export), and a kernel's grid is made of numbers"
    if has_gpu() and (found := jax.devices()[0]).compute_capability != "9.0":
        return f"the {found.device_kind} has compute capability {found.compute_capability}; wgmma is Hopper's, 9.0"
    return None


class _Part(NamedTuple):
    """Some channels of an array.

    Attributes:
      array: [B, N, channels and others].
      first: the tile that they begin with.
      channels: how many they are.
    """

    array: Float[Array, "B N _"]
    first: int
    channels: int


def stacked(
    q: Float[Array, "B N C"], k: Float[Array, "B N C"], v: Float[Array, "B N C"], *, head_dim: int, eps: float
) -> tuple[Float[Array, "B N C"], LinearAttentionState]:
    """Both halves, of q, k and v that are parts of one array: the result, and the state."""
    length = q.shape[1]
    q, k, v = _together(q, k, v)
    sums = state(k, v, head_dim=head_dim)
    return apply(q, sums, eps=eps)[:, :length], sums


def stacked_vjp(
    q: Float[Array, "B N C"],
    k: Float[Array, "B N C"],
    v: Float[Array, "B N C"],
    state: LinearAttentionState,
    g: Float[Array, "B N C"],
    *,
    eps: float,
) -> tuple[Float[Array, "B N C"], Float[Array, "B N C"], Float[Array, "B N C"]]:
    """Gradients of q, k and v, given that of the result: parts of one array, which the product behind them reads."""
    length = q.shape[1]
    q, k, v = _together(q, k, v)
    with_dq, dstate = apply_vjp(q, state, g, eps=eps)
    gradients = jax.new_ref(with_dq)
    state_vjp(k, v, dstate, into=gradients)
    return tuple(jnp.split(gradients[...][:, :length], 3, axis=-1))


def state(k: Float[Array, "B M C"] | _Part, v: Float[Array, "B M C"] | _Part, *, head_dim: int) -> LinearAttentionState:
    """First half: the sums over the tokens."""
    return _unpack(*_call(_state_tile, (k, v), (_firsts(head_dim),), operands=1, sums_of=head_dim), head_dim)


def apply(q: Float[Array, "B N C"] | _Part, state: LinearAttentionState, *, eps: float) -> Float[Array, "B N C"]:
    """Second half: each query reads the state."""
    queries = _part(q)
    o = _Part(jax.ShapeDtypeStruct((*queries.array.shape[:2], queries.channels), jnp.bfloat16), 0, queries.channels)
    (result,) = _call(functools.partial(_apply_tile, eps=eps), (queries,), _pack(state), operands=1, results=(o,))
    return result[:, : _length(q)]


def apply_vjp(
    q: Float[Array, "B N C"] | _Part, state: LinearAttentionState, g: Float[Array, "B N C"], *, eps: float
) -> tuple[Float[Array, "B _ _"], LinearAttentionState]:
    """Gradients of q and of the state, given that of the result. A part's gradient is in an array like the whole."""
    kernel, head_dim, queries = functools.partial(_apply_vjp_tile, eps=eps), state.kv.shape[-1], _part(q)
    dq, kv, minus_k_sum = _call(kernel, (queries, g), _pack(state), operands=3, results=(queries,), sums_of=head_dim)
    return dq[:, : _length(q)], _unpack(kv, -minus_k_sum, head_dim)


def state_vjp(
    k: Float[Array, "B M C"] | _Part,
    v: Float[Array, "B M C"] | _Part,
    g: LinearAttentionState,
    into: jax.Ref | None = None,
) -> tuple[Float[Array, "B M C"], ...]:
    """Gradients of k and v, given that of the state; nothing where they are written `into` an array, each at its part."""
    matrices, tokens = (*_pack(g), _firsts(g.kv.shape[-1])), (_part(k), _part(v))
    new = _call(_state_vjp_tile, tokens, matrices, operands=1, results=tokens, into=into)
    return () if into is not None else tuple(gradient[:, : _length(k)] for gradient in new)


def _part(x: Float[Array, "B N C"] | _Part) -> _Part:
    """The whole of an array as a part, with zeros behind its tokens up to what a tile is copied by: they add nothing to a sum."""
    return x if isinstance(x, _Part) else _Part(jnp.pad(x, ((0, 0), (0, -x.shape[1] % ROWS), (0, 0))), 0, x.shape[-1])


def _length(x: Float[Array, "B N C"] | _Part) -> int:
    """How many tokens were given."""
    return (x.array if isinstance(x, _Part) else x).shape[1]


def _together(*arrays: Float[Array, "B N C"]) -> list[_Part]:
    """As parts of one array: XLA sees that it is the one that they were taken from, and copies nothing."""
    channels = arrays[0].shape[-1]
    together = _part(jnp.concatenate(arrays, axis=-1)).array
    return [_Part(together, part * channels // TILE, channels) for part in range(len(arrays))]


def _state_tile(k, v, firsts, phi, kv, k_sum):
    phi[...] = jnp.maximum(k[...], 0)
    plgpu.commit_smem()
    plgpu.wgmma(kv, phi.T, v)
    plgpu.wgmma(k_sum, phi.T, firsts)
    plgpu.wgmma_wait(0)


def _apply_tile(q, s, z, o, phi, *, eps):
    phi[...] = jnp.maximum(q[...], 0)
    plgpu.commit_smem()
    o[...] = (_product(phi, s) / (_product(phi, z) + eps)).astype(o.dtype)


def _apply_vjp_tile(q, do, s, z, dq, phi, g, t, ds, minus_dz, *, eps):
    phi[...] = jnp.maximum(q[...], 0)
    plgpu.commit_smem()
    d = _product(phi, z) + eps
    quotient = do[...].astype(jnp.float32) / d
    g[...] = quotient.astype(g.dtype)
    t[...] = (quotient * _product(phi, s) / d).astype(t.dtype)
    plgpu.commit_smem()
    plgpu.wgmma(ds, phi.T, g)
    plgpu.wgmma(minus_dz, phi.T, t)
    plgpu.wgmma_wait(0)
    dq[...] = jnp.where(q[...] > 0, _product(g, s.T) - _product(t, z.T), 0).astype(dq.dtype)


def _state_vjp_tile(k, v, ds, dz, firsts, dk, dv, phi):
    phi[...] = jnp.maximum(k[...], 0)
    plgpu.commit_smem()
    dk[...] = jnp.where(k[...] > 0, _product(v, ds.T) + _product(firsts, dz.T), 0).astype(dk.dtype)
    dv[...] = _product(phi, ds).astype(dv.dtype)


def _product(a, b) -> Float[Array, "64 64"]:
    """Of two tiles in shared memory, in float32."""

    def compute(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(compute, plgpu.ACC((TILE, TILE), jnp.float32))


def _call(
    kernel: Callable,
    tokens: tuple[Float[Array, "B N C"] | _Part, ...],
    matrices: tuple[Float[Array, "_ _ 64 64"], ...],
    *,
    operands: int,
    results: tuple[_Part, ...] = (),
    into: jax.Ref | None = None,
    sums_of: int | None = None,
) -> tuple[Array, ...]:
    """Runs a kernel on every tile.

    Args:
      kernel: takes tiles in shared memory of `tokens`, `matrices`, the results and `operands`, and accumulators of its sums.
      tokens: of one shape, bfloat16.
      matrices: what is the same for all tokens; 1 in place of B or G where it is the same for all pictures or groups too.
      operands: tiles of its own that it needs.
      results: what it writes over tokens: parts of arrays of these shapes, of which the rest is left as it is.
      into: the array of all results; otherwise each has a new one.
      sums_of: channels of a head, where it sums two matrices of 64 x 64 over the tokens.

    Returns:
      The new arrays of the results, and in float32 for P parts of the tokens the first sum [P, B, G, 64, 64], and of the second
      what the rows of the heads' blocks add up to [P, B, G, 64].
    """
    sources = [_part(x) for x in tokens]
    new, changed = (len(results), 0) if into is None else (0, 1)
    (batch, length, _), channels = sources[0].array.shape, sources[0].channels
    groups, tiles = channels // TILE, pl.cdiv(length, TILE)
    tiles_each = pl.cdiv(tiles, min(tiles, pl.cdiv(BLOCKS, batch * groups)))
    parts = pl.cdiv(tiles, tiles_each)
    sums = 2 if sums_of else 0
    shapes = ((TILE, TILE), (TILE,))[:sums]
    if sums_of:
        matrices = (*matrices, _same_head(sums_of)[None, None].astype(jnp.bfloat16))

    def block(*refs):
        *refs, barrier = refs
        counts = (len(tokens), len(matrices), changed, new, sums, len(matrices), len(results), operands, sums)
        inputs, fixed, whole, outputs, sums_out, kept, written, own, staged = _split(refs, counts)
        outputs = outputs or [*whole] * len(results)
        b, group, part = (lax.axis_index(name) for name in ("picture", "group", "part"))
        for source, target in zip(fixed, kept, strict=True):
            at = tuple(0 if size == 1 else i for size, i in zip(source.shape, (b, group), strict=False))
            plgpu.copy_gmem_to_smem(source.at[at], target, barrier)
        plgpu.barrier_wait(barrier)
        same_head = kept.pop() if sums else None

        def all_tiles(*accumulators):
            def on_tile(indices, *arrays):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's results have left
                kernel(*arrays, *kept, *written, *own, *accumulators)
                plgpu.commit_smem()
                rows = pl.ds((part * tiles_each + indices[0]) * TILE, TILE)
                for source, target, part_of in zip(written, outputs, results, strict=True):
                    columns = pl.ds((part_of.first + group) * TILE, TILE)
                    plgpu.copy_smem_to_gmem(source, target.at[b, rows, columns])

            def spec(first):
                return plgpu.BlockSpec(
                    (TILE, TILE), lambda n: (part * tiles_each + n, first + group), transforms=_LAYOUT
                )

            pipeline = plgpu.emit_pipeline(
                on_tile,
                grid=(tiles_each,),
                in_specs=[spec(each.first) for each in sources],
                max_concurrent_steps=min(BUFFERS, tiles_each),
            )
            pipeline(*(ref.at[b] for ref in inputs))
            if sums:
                staged[0][...] = accumulators[0][...]
                staged[1][...] = (accumulators[1][...] * same_head[...].astype(jnp.float32)).sum(1)
                plgpu.commit_smem()
                for source, target in zip(staged, sums_out, strict=True):
                    plgpu.copy_smem_to_gmem(source, target.at[part, b, group])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(all_tiles, *[plgpu.ACC((TILE, TILE), jnp.float32)] * sums)

    tile = plgpu.SMEM((TILE, TILE), jnp.bfloat16, transforms=_LAYOUT)
    out_type = (
        *(jax.ShapeDtypeStruct(each.array.shape, jnp.bfloat16) for each in results[:new]),
        *(jax.ShapeDtypeStruct((parts, batch, groups, *shape), jnp.float32) for shape in shapes),
    )
    scratch_types = (
        *[tile] * (len(matrices) + len(results) + operands),
        *(plgpu.SMEM(shape, jnp.float32) for shape in shapes),
        plgpu.Barrier(num_arrivals=len(matrices)),
    )
    grid = {"grid": (batch, groups, parts), "grid_names": ("picture", "group", "part")}
    options = {"out_type": out_type, "compiler_params": plgpu.CompilerParams(lowering_semantics=_SEMANTICS)}
    if into is None:
        run = plgpu.kernel(block, scratch_types=scratch_types, **grid, **options)
    else:  # within `jax.shard_map` that cannot change an array; this can, but before JAX 0.12 not be mapped over (`jax.vmap`)

        def with_scratch(*refs):
            pl.run_scoped(functools.partial(block, *refs), *scratch_types)

        run = pl.kernel(with_scratch, mesh=plgpu.Mesh(**grid), **options)
    # For those who count what a program moves (`sana_jax.aot.traffic`): it is less than the arrays that have the parts.
    over_tokens = 2 * (len(tokens) + len(results)) * batch * length * channels
    others = sum(x.size * x.dtype.itemsize for x in (*matrices, *out_type[new:]))
    with set_xla_metadata(bytes_accessed=over_tokens + others):
        return run(*(each.array for each in sources), *matrices, *[into] * changed)


def _split(items: Sequence, counts: tuple[int, ...]) -> list[Sequence]:
    """As many items as each count says, one after the other."""
    ends = list(itertools.accumulate(counts))
    return [items[end - count : end] for count, end in zip(counts, ends, strict=True)]


def _firsts(head_dim: int) -> Float[Array, "1 1 64 64"]:
    """Ones in the first channel of each head: its product sums a token's head once."""
    return jnp.broadcast_to(jnp.arange(TILE) % head_dim == 0, (1, 1, TILE, TILE)).astype(jnp.bfloat16)


def _same_head(head_dim: int) -> Bool[Array, "64 64"]:
    """True in the blocks of the heads."""
    head = jnp.arange(TILE) // head_dim
    return head[:, None] == head


def _pack(state: LinearAttentionState) -> tuple[Float[Array, "B G 64 64"], Float[Array, "B G 64 64"]]:
    """S and Z."""
    batch, heads, d, _ = state.kv.shape
    rows = state.kv.reshape(batch, -1, TILE, d), state.k_sum.reshape(batch, -1, TILE, 1)
    s, z = (jnp.where(_same_head(d), jnp.tile(x, TILE // x.shape[-1]), 0).astype(jnp.bfloat16) for x in rows)
    return s, z


def _unpack(kv: Float[Array, "P B G 64 64"], k_sum: Float[Array, "P B G 64"], head_dim: int) -> LinearAttentionState:
    """Sums over the parts, and of the first the heads' blocks."""
    batch, groups, *_ = kv.shape[1:]
    blocks = kv.sum(0).reshape(batch, groups, TILE // head_dim, head_dim, TILE // head_dim, head_dim)
    kv = jnp.einsum("bghdhe->bghde", blocks).reshape(batch, -1, head_dim, head_dim)
    return LinearAttentionState(kv, k_sum.sum(0).reshape(batch, -1, head_dim))
