"""LPIPS from its two files against PyTorch, with random weights in both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.training import lpips
from sana_jax.training.perceptual import perceptual_distance

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

WIDTHS = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("lpips")
    vgg, heads = {}, {}
    for stage, (places, widths) in enumerate(zip(lpips.STAGES, WIDTHS, strict=True)):
        for place, inputs, outputs in zip(places, widths[:-1], widths[1:], strict=True):
            vgg[f"features.{place}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * inputs**-0.5 / 3
            vgg[f"features.{place}.bias"] = torch.randn(outputs, generator=generator) * 0.1
        heads[f"lin{stage}.model.1.weight"] = torch.rand(1, widths[-1], 1, 1, generator=generator)
    torch.save(vgg, path / "vgg16.pth")
    torch.save(heads, path / "heads.pth")
    return path / "vgg16.pth", path / "heads.pth"


def reference(files, a, b):
    """The authors' formula in PyTorch, NCHW."""
    vgg, heads = (torch.load(file) for file in files)
    shift, scale = (torch.tensor(v)[None, :, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    x = torch.from_numpy(np.concatenate([a, b]).transpose(0, 3, 1, 2))
    x = (x - shift) / scale
    total = 0
    for stage, places in enumerate(lpips.STAGES):
        if stage:
            x = torch.nn.functional.max_pool2d(x, 2)
        for place in places:
            x = torch.relu(
                torch.nn.functional.conv2d(x, vgg[f"features.{place}.weight"], vgg[f"features.{place}.bias"], padding=1)
            )
        unit = x / (x.norm(dim=1, keepdim=True) + 1e-10)
        first, second = unit.chunk(2)
        line = torch.nn.functional.conv2d((first - second) ** 2, heads[f"lin{stage}.model.1.weight"])
        total = total + line.mean(dim=(1, 2, 3))
    return total.numpy()


def test_the_shapes_known_without_the_files_are_theirs(files):
    def shape(x):
        return x.shape, x.dtype

    assert jax.tree.map(shape, lpips.shapes()) == jax.tree.map(shape, lpips.load(*files))


def test_lpips_equals_the_authors_formula(files):
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32) for _ in range(2))
    params = lpips.load(*files)
    ours = perceptual_distance(
        lambda x: lpips.features(params, x), jnp.asarray(a), jnp.asarray(b), params["channel_weights"]
    )
    np.testing.assert_allclose(ours, reference(files, a, b), rtol=1e-4)


def test_leaving_the_channel_weights_out_breaks_parity(files):
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32) for _ in range(2))
    params = lpips.load(*files)
    ours = perceptual_distance(lambda x: lpips.features(params, x), jnp.asarray(a), jnp.asarray(b))
    assert np.abs(ours / reference(files, a, b) - 1).max() > 0.1


def test_missing_files_are_an_error_that_says_which(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.lpips_vgg='' is no file. LPIPS needs .*vgg16-397923af.pth"):
        lpips.load("", tmp_path / "heads.pth")
