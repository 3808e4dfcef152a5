"""On a GPU everything gives what it gives on the CPU. Run with JAX_PLATFORMS=cuda,cpu (benchmarks/gpu_session.py does)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sana_jax.kernels.depthwise_conv.api import depthwise_conv
from sana_jax.kernels.glu_mbconv.api import gated_depthwise
from sana_jax.kernels.linear_attention.api import linear_attention
from sana_jax.kernels.softmax_attention.api import softmax_attention

from sana_jax import SanaPipeline
from sana_jax.diffusion import flow

pytestmark = pytest.mark.gpu
PROMPTS = ["a red apple, noto style, on a blue background", "a cat face, twemoji style, on a yellow background"]


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """float32 products in float32, not in TF32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def devices():
    try:
        return jax.devices("gpu")[0], jax.devices("cpu")[0]
    except RuntimeError:
        pytest.skip("no GPU")


@pytest.fixture(scope="module")
def pipe():
    return SanaPipeline.from_pretrained()


def on_both(devices, function, *arguments):
    """The results on either device, as NumPy."""
    return [jax.device_get(jax.jit(function)(*jax.device_put(arguments, device))) for device in devices]


def in_bfloat16(devices, function, implementations, *arrays):
    """The results of an implementation on the GPU in bfloat16, and of another on the CPU in float32 of the rounded arrays."""
    gpu, cpu = (jax.jit(functools.partial(function, name)) for name in implementations)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    found = gpu(*jax.device_put(rounded, devices[0]))
    expected = cpu(*jax.device_put([x.astype(jnp.float32) for x in rounded], devices[1]))
    return [np.float32(x) for x in jax.device_get(found)], jax.device_get(expected)


def assert_close(pair, tolerance=1e-4):
    for gpu, cpu in zip(*map(jax.tree.leaves, pair), strict=True):
        assert np.linalg.norm(gpu - cpu) <= tolerance * np.linalg.norm(cpu)


def test_velocities(pipe, devices):
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(2, *pipe.latent_shape(64, 64))), jnp.float32)
    text = jnp.asarray(rng.normal(size=(2, 24, pipe.transformer.config.caption_channels)), jnp.float32)
    mask, timesteps = jnp.ones((2, 24), jnp.int32), jnp.asarray([900.0, 100.0])

    def velocity(params, *inputs):
        return pipe.transformer.apply({"params": params}, *inputs)

    assert_close(on_both(devices, velocity, pipe.params["transformer"], latents, timesteps, text, mask))


def test_gradients_of_the_flow_loss(pipe, devices):
    rng = np.random.default_rng(0)
    shape = (2, *pipe.latent_shape(64, 64))
    latents, noise = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    text = jnp.asarray(rng.normal(size=(2, 24, pipe.transformer.config.caption_channels)), jnp.float32)
    mask, sigma = jnp.ones((2, 24), jnp.int32), jnp.asarray([0.9, 0.1])

    def loss(params):
        noisy = flow.interpolate(latents, noise, sigma)
        velocity = pipe.transformer.apply({"params": params}, noisy, 1000 * sigma, text, mask)
        return jnp.mean(flow.flow_loss(velocity, latents, noise))

    assert_close(on_both(devices, jax.grad(loss), pipe.params["transformer"]), tolerance=1e-3)


def test_reconstructions(pipe, devices):
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)), jnp.float32)

    def reconstruct(params, images):
        return pipe.autoencoder.apply({"params": params}, images)

    assert_close(on_both(devices, reconstruct, pipe.params["autoencoder"], images))


@pytest.mark.parametrize("tokens", [64, 1024])
def test_linear_attention_and_its_gradient(devices, tokens):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, tokens, 1152)), jnp.float32) for _ in range(3))
    attend = functools.partial(linear_attention, head_dim=32)
    assert_close(on_both(devices, attend, q, k, v))
    assert_close(on_both(devices, jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), argnums=(0, 1, 2)), q, k, v), 1e-3)


@pytest.mark.parametrize("keys", [300, 128, 77])
def test_the_kernel_of_softmax_attention_and_its_gradient(devices, keys):
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=(3, length, 224)) for length in (256, keys, keys, 256))
    mask = jnp.asarray(np.arange(keys) < [[keys], [keys // 2], [0]])  # the last picture's text is all padding

    def value_and_gradients(implementation, q, k, v, g):
        attend = functools.partial(softmax_attention, mask=mask, heads=2, implementation=implementation)
        y, vjp = jax.vjp(attend, q, k, v)
        return y, *vjp(g)

    assert_close(in_bfloat16(devices, value_and_gradients, ("cudnn", "whole"), q, k, v, g), 1e-2)


@pytest.mark.parametrize("shape", [(2, 1024, 2240), (3, 1000, 1152), (1, 243, 2240)])
@pytest.mark.parametrize("stacked", [False, True])
def test_the_kernels_of_linear_attention_and_their_gradient(devices, stacked, shape):
    if devices[0].compute_capability != "9.0":
        pytest.skip("the kernels are for Hopper")
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=shape) + (part < 2) for part in range(4))

    def value_and_gradients(implementation, q, k, v, g):
        attend = functools.partial(linear_attention, head_dim=32, stacked=stacked, implementation=implementation)
        y, vjp = jax.vjp(attend, q, k, v)
        return y, *vjp(g)

    assert_close(in_bfloat16(devices, value_and_gradients, ("pallas_gpu", "xla"), q, k, v, g), 1e-2)


def test_depthwise_convolution_and_its_gradient(devices):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 32, 32, 256)), jnp.float32)
    kernel, bias = jnp.asarray(rng.normal(size=(3, 3, 256)), jnp.float32), jnp.ones(256)
    assert_close(on_both(devices, depthwise_conv, x, kernel, bias))
    gradient = jax.grad(lambda *inputs: jnp.sum(jnp.sin(depthwise_conv(*inputs))), argnums=(0, 1, 2))
    assert_close(on_both(devices, gradient, x, kernel, bias), 1e-3)


@pytest.mark.parametrize(("shape", "row_padding"), [((2, 32, 32, 5600), 1), ((1, 21, 43, 520), 0)])
def test_the_kernels_of_the_mix_ffn_and_their_gradients(devices, shape, row_padding):
    if devices[0].compute_capability != "9.0":
        pytest.skip("the kernels are for Hopper")
    rng = np.random.default_rng(0)
    result = shape[0], shape[1] - 2 * (1 - row_padding), *shape[2:]
    arrays = [rng.normal(size=size) for size in (shape, shape, (3, 3, 2 * shape[-1]), 2 * shape[-1], result)]

    def value_and_gradients(implementation, *arrays):
        middle = functools.partial(gated_depthwise, row_padding=row_padding, implementation=implementation)
        y, vjp = jax.vjp(middle, *arrays[:-1])
        return y, *vjp(arrays[-1])

    assert_close(in_bfloat16(devices, value_and_gradients, ("pallas_gpu", "xla"), *arrays), 1e-2)


def test_pictures(pipe, devices):
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(2, *pipe.latent_shape(64, 64))), jnp.float32)
    pictures = []
    for device in devices:
        with jax.default_device(device):
            again = SanaPipeline.from_pretrained()
            pictures.append(again(PROMPTS, latents=noise, output_type="np"))
    assert np.abs(pictures[0] - pictures[1]).max() < 3 / 255
    assert pictures[0].std() > 0.1
