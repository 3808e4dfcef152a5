"""Rematerialisation policies: the same gradient from less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.models.transformer import SanaTransformer, TransformerConfig

POLICIES = ("none", "minimal", "attention+cross_attention+feed_forward", "full", "offload")
INPUTS = (
    jax.random.normal(jax.random.key(1), (2, 8, 8, 4)),
    jnp.asarray([3.0, 700.0]),
    jax.random.normal(jax.random.key(2), (2, 5, 16)),
    jnp.ones((2, 5), jnp.int32),
)


@functools.cache
def gradient(policy):
    """(gradient, bytes of temporary memory) of a transformer with six blocks."""
    config = TransformerConfig(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        width=32,
        num_layers=6,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        caption_channels=16,
        remat=policy,
    )
    module = SanaTransformer(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *INPUTS)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), shapes)
    loss = jax.grad(lambda params: jnp.mean(jnp.square(module.apply({"params": params}, *INPUTS))))
    compiled = jax.jit(loss).lower(params).compile()
    return jax.device_get(compiled(params)), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_a_policy_changes_no_gradient(policy):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient(policy)[0], gradient("none")[0]
    )


def test_policies_that_keep_less_take_less_memory():
    sizes = [gradient(policy)[1] for policy in POLICIES[:4]]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4, dict(zip(POLICIES, sizes, strict=False))


def test_an_unknown_policy_is_an_error_that_lists_policies_and_layers():
    message = "'all' is unknown; use one of none, minimal, full, offload, or layers.*attention, cross_attention"
    with pytest.raises(ValueError, match=message):
        TransformerConfig(remat="all")
