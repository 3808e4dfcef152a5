"""Activations in bfloat16 against float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.kernels.activations import gelu, silu


def tanh_gelu(x):
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("function,exact", [(gelu, tanh_gelu), (silu, lambda x: x / (1 + math.exp(-x)))])
def test_an_activation_in_bfloat16_is_rounded_once(function, exact):
    x = jnp.linspace(-4, 4, 801).astype(jnp.bfloat16)
    expected = np.array([exact(float(value)) for value in x])
    found = np.asarray(jax.jit(function)(x).astype(jnp.float32), np.float64)
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-6)  # half a unit in the last place
