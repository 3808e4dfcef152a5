"""Every implementation of linear attention against the quadratic form; the kernels are interpreted.

Interpreted memory is NaN where nothing was written and, on a TPU, beyond the ends of arrays. A GPU's copy engine reads zeros there.
"""

import contextlib
import functools

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from sana_jax.kernels.linear_attention import api, pallas_gpu, pallas_tpu, reference, xla

EPS = 1e-8
BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
gpu_is_interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="JAX interprets a GPU's products from 0.11 on"
)


@contextlib.contextmanager
def small_blocks():
    """Interprets the kernels, which take 16 tokens and 256 channels at a time: a step takes long, and ends are to be met."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "BLOCK_TOKENS", 16)
        patch.setattr(pallas_tpu, "BLOCK_CHANNELS", 256)
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
            yield


@contextlib.contextmanager
def small_grid():
    """Interprets the GPU's kernels, each block of the grid with two tiles of tokens or three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_gpu, "BLOCKS", 12)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(uninitialized_memory="nan")):
            yield


def tokens(*shape, dtype="float32", count=4):
    """q, k, v and a gradient; q and k above zero: next to a vanishing normaliser no two orders of sums agree."""
    rng = np.random.default_rng(shape)
    return [jnp.asarray(rng.standard_normal(shape) + (part < 2), dtype) for part in range(count)]


def relative_error(value, expected):
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


def value_and_gradients(attention, q, k, v, g):
    value, vjp = jax.vjp(attention, q, k, v)
    return value, *vjp(g)


def frozen_normaliser(q, k, v, *, head_dim):
    """The quadratic form whose normaliser has no derivative."""
    q, k, v = (x.reshape(*x.shape[:2], -1, head_dim) for x in (jnp.maximum(q, 0), jnp.maximum(k, 0), v))
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k)
    weights = scores / jax.lax.stop_gradient(scores.sum(-1, keepdims=True) + EPS)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(*q.shape[:2], -1)


def errors(implementation, shape, head_dim, dtype, *, stacked=False):
    """Relative errors of the result and of the gradients of q, k, v.

    The gradients of q and k are differences, which vanish where there is one token: they are compared with the larger of
    themselves and what is subtracted from.
    """
    inputs = tokens(*shape, dtype=dtype)
    ours = functools.partial(
        api.linear_attention, head_dim=head_dim, eps=EPS, stacked=stacked, implementation=implementation
    )
    exact = functools.partial(reference.linear_attention, head_dim=head_dim, eps=EPS)
    with small_grid() if implementation == "pallas_gpu" else small_blocks():
        found = jax.jit(functools.partial(value_and_gradients, ours))(*inputs)
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    wide = [x.astype(jnp.float32) for x in inputs]
    expected = value_and_gradients(exact, *wide)
    minuends = value_and_gradients(functools.partial(frozen_normaliser, head_dim=head_dim), *wide)
    return [
        np.linalg.norm(np.float64(x) - np.float64(y)) / max(np.linalg.norm(y), np.linalg.norm(minuend))
        for x, y, minuend in zip(found, expected, minuends, strict=True)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("stacked", [False, True])
def test_value_and_gradients_are_those_of_the_quadratic_form(implementation, stacked, dtype):
    # Two and a half blocks of tokens, one and a half of lanes, half a group of heads.
    assert max(errors(implementation, (2, 40, 320), 32, dtype, stacked=stacked)) < BOUND[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("channels", "head_dim"), [(24, 8), (160, 32), (96, 12), (512, 256), (8, 8)])
def test_any_number_and_size_of_heads_lie_side_by_side(channels, head_dim, dtype):
    assert max(errors("xla_wide", (2, 257, channels), head_dim, dtype)) < BOUND[dtype]


@gpu_is_interpreted
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("count", [304, 299])
def test_value_and_gradients_of_the_kernels_for_gpus(stacked, count):
    # Five tiles of tokens, of which the last has 48, or 43 and five rows of zeros; three groups of two heads.
    assert max(errors("pallas_gpu", (2, count, 192), 32, "bfloat16", stacked=stacked)) < BOUND["bfloat16"]


@gpu_is_interpreted
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
def test_on_gpus_any_number_of_tokens_and_of_groups_will_do(data):
    head_dim, groups = data.draw(st.sampled_from([8, 16, 32, 64])), data.draw(st.integers(1, 3))
    shape = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 200)), 64 * groups
    assert max(errors("pallas_gpu", shape, head_dim, "bfloat16")) < BOUND["bfloat16"]


@pytest.mark.parametrize("shape", [(2, 1024, 2240), (16, 1024, 1152), (1, 16384, 2240), (1, 972, 2240), (1, 104, 128)])
@pytest.mark.parametrize("stacked", [False, True])
def test_the_kernels_for_gpus_can_be_lowered(shape, stacked):
    attention = functools.partial(api.linear_attention, head_dim=32, stacked=stacked, implementation="pallas_gpu")
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 4
    lowered = (
        jax.jit(functools.partial(value_and_gradients, attention)).trace(*arrays).lower(lowering_platforms=("cuda",))
    )
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 4  # state and apply, and the derivative of each


def test_on_gpus_the_gradients_of_stacked_tokens_are_written_into_one_array():
    attention = functools.partial(api.linear_attention, head_dim=32, stacked=True, implementation="pallas_gpu")
    mesh, pictures = jax.make_mesh((1,), ("data",)), jax.P("data")

    def loss(tokens):
        return attention(*jnp.split(tokens, 3, axis=-1)).astype(jnp.float32).sum()

    gradient = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=pictures, out_specs=pictures, check_vma=False)
    tokens = jax.ShapeDtypeStruct((2, 304, 3 * 192), jnp.bfloat16, sharding=jax.NamedSharding(mesh, pictures))
    text = jax.jit(gradient).trace(tokens).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("output_operand_alias<") == 1, "dk and dv join dq"


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=4, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
def test_any_number_of_tokens_and_heads_will_do(data):
    head_dim = data.draw(st.sampled_from([8, 16, 32, 64, 128]))
    heads = data.draw(st.integers(128 // head_dim, 300 // head_dim))
    shape = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 36)), heads * head_dim
    dtype = data.draw(st.sampled_from(list(BOUND)))
    assert max(errors("pallas_tpu", shape, head_dim, dtype)) < BOUND[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_token_attends_to_itself_and_its_query_and_key_get_no_gradient(dtype):
    assert max(errors("pallas_tpu", (1, 1, 128), 8, dtype)) < BOUND[dtype]


@pytest.mark.parametrize("implementation", ["xla_wide", "pallas_tpu"])
def test_the_state_is_that_of_xla(implementation):
    k, v = tokens(1, 20, 160, count=2)
    with small_blocks():
        found = api.linear_attention_state(k, v, head_dim=32, implementation=implementation)
    for ours, expected in zip(found, xla.state(k, v, head_dim=32), strict=True):
        assert ours.shape == expected.shape and relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize(("count", "wide"), [(256, True), (255, False)])
def test_on_cpus_heads_lie_side_by_side_where_tokens_are_many(count, wide):
    assert (("cpu", "xla_wide") in api._choose(None, *tokens(1, count, 8, count=2), head_dim=4)) == wide


def test_without_the_masks_what_lies_beyond_the_arrays_would_spoil_the_result(monkeypatch, request):
    jax.clear_caches()  # kernels are traced once
    request.addfinalizer(jax.clear_caches)
    q, k, v = tokens(1, 20, 160, count=3)
    attention = functools.partial(api.linear_attention, head_dim=32, implementation="pallas_tpu")
    monkeypatch.setattr(pallas_tpu._Group, "load", lambda _, ref, tokens=True: ref[...].astype(jnp.float32))
    with small_blocks():
        assert jnp.isnan(attention(q, k, v)).any()


def test_a_query_without_positive_channel_gives_zero_and_gets_no_gradient():
    k, v = tokens(1, 16, 128, count=2)
    with small_blocks():
        attention = functools.partial(api.linear_attention, k=k, v=v, head_dim=32, implementation="pallas_tpu")
        value, vjp = jax.vjp(attention, -jnp.ones(k.shape))
        assert not value.any() and not vjp(v)[0].any()


@pytest.mark.parametrize(
    "dtype, channels, head_dim, reason",
    [
        ("float32", 128, 32, "its arrays are float32; .* all must be bfloat16"),
        ("bfloat16", 144, 24, "head_dim=24 does not divide 64"),
        ("bfloat16", 96, 32, "96 channels are not whole tiles of 64"),
    ],
)
def test_what_the_kernels_for_gpus_cannot_do_is_told(dtype, channels, head_dim, reason):
    attention = functools.partial(api.linear_attention, head_dim=head_dim, implementation="pallas_gpu")
    with pytest.raises(ValueError, match=f"implementation='pallas_gpu' cannot run: .*{reason}"):
        attention(*tokens(1, 4, channels, count=3, dtype=dtype))


@pytest.mark.parametrize(
    "dtypes, channels, head_dim, reason",
    [
        (("float32", "float32"), 144, 24, "head_dim=24 is not one of 8, 16, 32, 64, 128"),
        (("float32", "float32"), 64, 32, "64 channels are fewer than 128 lanes"),
        (("float16", "float16"), 128, 32, "float16; all must be float32, or all bfloat16"),
        (("float32", "bfloat16"), 128, 32, "bfloat16, float32; all must be"),
    ],
)
def test_what_the_kernels_cannot_do_is_left_to_xla_unless_they_are_asked_for(dtypes, channels, head_dim, reason):
    inputs = [x.astype(dtype) for x, dtype in zip(tokens(1, 4, channels, count=2), dtypes, strict=True)]
    state = functools.partial(api.linear_attention_state, head_dim=head_dim)
    with pytest.raises(ValueError, match=f"implementation='pallas_tpu' cannot run: .*{reason}"):
        state(*inputs, implementation="pallas_tpu")
    assert "pallas_call" not in str(jax.make_jaxpr(state)(*inputs))


def test_an_unknown_implementation_and_a_vanishing_eps_are_errors():
    inputs = tokens(1, 4, 128, count=3)
    with pytest.raises(
        ValueError, match="implementation='cuda' is unknown; use None, xla, xla_wide, pallas_tpu, pallas_gpu"
    ):
        api.linear_attention(*inputs, head_dim=32, implementation="cuda")
    with pytest.raises(ValueError, match="eps=0.0 leaves a query without positive channels undefined"):
        api.linear_attention(*inputs, head_dim=32, eps=0.0)


def test_arrays_that_do_not_fit_together_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users call it
    (q,), (k, v) = tokens(1, 8, 64, count=1), tokens(1, 4, 64, count=2)
    with pytest.raises(ValueError, match=r"k is \(1, 4, 64\) and v is \(1, 3, 64\)"):
        api.linear_attention(q, k, v[:, :3], head_dim=32)
    with pytest.raises(ValueError, match=r"q is \(1, 8, 32\) and the state of 1 sequences with 2 heads of 32"):
        api.linear_attention(q[..., :32], k, v, head_dim=32)


def test_stacked_arrays_of_other_lengths_are_refused():
    (q,), (k, v) = tokens(1, 8, 64, count=1), tokens(1, 4, 64, count=2)
    with pytest.raises(ValueError, match=r"\(1, 8, 64\), \(1, 4, 64\).* use stacked=False"):
        api.linear_attention(q, k, v, head_dim=32, stacked=True)
