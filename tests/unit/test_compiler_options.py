"""What XLA is told on a CPU: which library multiplies, and how wide its own loops are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import compiler_options

AVX2, AVX512 = {"fma", "avx2"}, {"fma", "avx2", "avx512f", "avx512_vnni"}


@pytest.mark.parametrize(
    ("instructions", "ynnpack"),
    [(AVX512, False), (AVX2, True), (AVX512 | {"avx512_bf16", "amx_bf16"}, True), (set(), True)],
    ids=["avx512", "avx2", "amx", "unknown"],
)
def test_library_of_products(instructions, ynnpack, monkeypatch):
    monkeypatch.setattr(compiler_options, "_instructions", lambda: frozenset(instructions))
    x = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    product = jax.jit(lambda x: jnp.tanh(x) @ x, compiler_options=compiler_options.compiler_options("cpu"))
    compiled = product.lower(x).compile()
    assert ("ynn_fusion" in compiled.as_text()) == ynnpack
    assert compiled.as_text().count("tanh(") == 1, "loops are XLA's"
    np.testing.assert_allclose(compiled(x), np.tanh(x) @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("instructions", [AVX512, AVX512 | {"avx512_bf16"}], ids=["avx512", "bfloat16"])
def test_loops_use_512_bits_where_the_clock_stays(instructions, monkeypatch):
    monkeypatch.setattr(compiler_options, "_instructions", lambda: frozenset(instructions))
    wide = compiler_options.compiler_options("cpu").get("xla_cpu_prefer_vector_width") == "512"
    assert wide == ("avx512_bf16" in instructions)


def test_other_platforms_keep_their_defaults():
    assert compiler_options.compiler_options("gpu") == compiler_options.compiler_options("tpu") == {}
