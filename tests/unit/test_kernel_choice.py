"""Which back end of a kernel is taken."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from sana_jax.kernels import choice as kernel_choice
from sana_jax.kernels.choice import choose, run
from sana_jax.kernels.glu_mbconv import pallas_gpu

PACKAGE = "sana_jax.kernels.glu_mbconv"
NAMES = ("xla", "pallas_tpu", "pallas_gpu")


def choice(asked, channels=128, names=NAMES, **options):
    x = jnp.ones((1, 4, 4, channels), jnp.bfloat16)
    return choose(PACKAGE, names, asked, x, x, jnp.ones((3, 3, 2 * channels)), row_padding=1, **options)


def test_nobody_asked_takes_what_is_best_on_each_platform_and_can_run(monkeypatch):
    assert choice(None) == (("tpu", "pallas_tpu"),)
    assert choice(None, channels=64) == ()  # the TPU's kernel refuses
    monkeypatch.setattr(kernel_choice, "_may_have_gpu", lambda: True)
    assert choice(None) == (("tpu", "pallas_tpu"),)  # a plugin, and no GPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(pallas_gpu, "refusal", lambda *arrays, row_padding: None)
    assert choice(None) == (("tpu", "pallas_tpu"), ("cuda", "pallas_gpu"))
    assert choice(None, names=("xla", "pallas_tpu")) == (("tpu", "pallas_tpu"),)
    assert choice(None, only_asked=("pallas_gpu",)) == (("tpu", "pallas_tpu"),)
    assert choice("pallas_gpu", only_asked=("pallas_gpu",)) == "pallas_gpu"
    assert choice(None, names=("xla",)) == ()
    monkeypatch.setattr(pallas_gpu, "refusal", lambda *arrays, row_padding: "it is an Ampere")
    assert choice(None) == (("tpu", "pallas_tpu"),)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_of_a_model_are_traced_without_waking_a_device(dtype):
    if dtype == "bfloat16" and kernel_choice._may_have_gpu():
        pytest.skip("JAX has a plugin for GPUs, and has to look whether there is a Hopper")
    script = (
        "import jax, sys; from jax._src import xla_bridge; from sana_jax.models.transformer import *; "
        f"config = TransformerConfig(width=128, num_cross_attention_heads=2, num_layers=1, dtype={dtype!r}); "
        "shape = lambda *s: jax.ShapeDtypeStruct(s, jax.numpy.float32); "
        "inputs = shape(1, 4, 4, 32), shape(1), shape(1, 6, 2304), shape(1, 6); "
        "key = jax.ShapeDtypeStruct((2,), jax.numpy.uint32); "
        "jax.eval_shape(SanaTransformer(config).init, key, *inputs); sys.exit(len(xla_bridge._backends))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=300, check=False).returncode == 0


def test_what_is_asked_for_is_taken_or_says_why_not():
    assert [choice(name) for name in NAMES] == list(NAMES)
    with pytest.raises(ValueError, match="implementation='pallas_tpu' cannot run: 64 channels are fewer than"):
        choice("pallas_tpu", channels=64)
    with pytest.raises(ValueError, match="implementation='triton' is unknown; use None, xla, pallas_tpu, pallas_gpu"):
        choice("triton")


def test_other_platforms_run_the_form_of_xla():
    value, gate = (jnp.full((1, 4, 4, 8), x, jnp.bfloat16) for x in (1, 2))
    arrays = value, gate, jnp.ones((3, 3, 16)), jnp.zeros(16)
    found = [run(PACKAGE, choice, "gated_depthwise", *arrays, row_padding=1) for choice in (choice(None), "xla")]
    assert jnp.array_equal(*found)
