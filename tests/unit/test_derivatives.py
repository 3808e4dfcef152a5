"""Forward mode: its derivatives are the transposes of the backward passes that we wrote, and only inside it are there any."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from sana_jax.kernels.derivatives import custom_vjp, forward_mode
from sana_jax.kernels.linear_attention.api import linear_attention
from sana_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sana_jax.models.transformer import SanaTransformer
from sana_jax.weights import folder

TINY = dataclasses.replace(
    tiny_run.TRANSFORMER, width=32, attention_head_dim=8, qk_norm=True, timestep_scale=0.001, integer_timesteps=False
)
DC_AE = AutoencoderConfig(
    latent_channels=4,
    encoder_block_out_channels=(16, 32),
    decoder_block_out_channels=(16, 32),
    encoder_block_types=("ResBlock", "EfficientViTBlock"),
    decoder_block_types=("ResBlock", "EfficientViTBlock"),
    encoder_layers_per_block=(1, 1),
    decoder_layers_per_block=(1, 1),
    encoder_qkv_multiscales=((), (5,)),
    decoder_qkv_multiscales=((), (5,)),
    attention_head_dim=8,
)


def normal(shapes, seed, std=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=std), jnp.float32), shapes)


def assert_is_transpose(function, *inputs):
    """<w, J u> = <J^T w, u> for random u and w, of all inputs at once."""
    directions, weights = normal(inputs, 1), normal(jax.eval_shape(function, *inputs), 2)
    with forward_mode():
        same, forward = jax.jit(lambda *x: jax.jvp(function, x, directions))(*inputs)

    @jax.jit
    def pull_back(*inputs):
        value, vjp = jax.vjp(function, *inputs)
        return value, vjp(weights)

    value, backward = pull_back(*inputs)
    np.testing.assert_allclose(same, value, atol=1e-5 * np.abs(value).max())
    found = sum(map(jnp.vdot, jax.tree.leaves(weights), jax.tree.leaves(forward)))
    wanted = sum(map(jnp.vdot, jax.tree.leaves(backward), jax.tree.leaves(directions)))
    scale = np.linalg.norm(np.ravel(weights)) * np.linalg.norm(np.ravel(forward))
    assert abs(float(found - wanted)) < 1e-5 * scale


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": False, "remat": "full"},
        {"self_attention": "softmax", "feed_forward": "gelu_mlp"},
        {"unroll": 2, "remat": "minimal"},
    ],
    ids=str,
)
def test_a_transformer_and_its_parameters(changes):
    module = SanaTransformer(dataclasses.replace(TINY, **changes))
    params = normal(folder.abstract_params(module), 3, 0.3)
    latents, text = normal((jnp.zeros((2, 4, 4, 8)), jnp.zeros((2, 3, 32))), 4)
    mask, timesteps = jnp.asarray([[1, 1, 0], [1, 1, 1]]), jnp.asarray([300.0, 700.0])

    def velocity(params, latents, timesteps, text):
        return module.apply({"params": params}, latents, timesteps, text, mask)

    assert_is_transpose(velocity, params, latents, timesteps, text)


def test_an_autoencoder():
    module = Autoencoder(DC_AE)
    params = normal(folder.abstract_params(module), 3, 0.2)
    assert_is_transpose(
        lambda params, x: module.apply({"params": params}, x), params, normal(jnp.zeros((1, 8, 8, 3)), 4)
    )


def test_outside_there_is_none_even_where_it_was_traced_inside():
    @custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (-g,))
    compiled = jax.jit(double)
    with forward_mode():
        assert jax.jvp(compiled, (1.0,), (1.0,)) == (2.0, 2.0)
        assert jax.grad(compiled)(1.0) == 2.0
    assert jax.grad(compiled)(1.0) == -1.0, "its own derivative"
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(compiled, (1.0,), (1.0,))


def test_a_kernel_that_is_asked_for_by_name_is_refused():
    x = jnp.ones((1, 128, 128), jnp.bfloat16)
    with (
        forward_mode(),
        pytest.raises(ValueError, match="'pallas_tpu' cannot run: it has no derivative in forward mode. Use 'xla'"),
    ):
        linear_attention(x, x, x, head_dim=32, implementation="pallas_tpu")
