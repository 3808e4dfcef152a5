"""ControlNets: residuals, pictures and folders of diffusers' `SanaControlNetModel` and `SanaControlNetPipeline`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sana_jax import SanaPipeline
from sana_jax.models.controlnet import Branch, ControlNetConfig, SanaControlNet, control
from sana_jax.models.layers import take_apart
from sana_jax.weights import layout, parts

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from parity_errors import relative_error
from tiny_diffusers import allow_any_size, draw, save_tiny
from tiny_pipeline import TRANSFORMER

OPTIONS = dict(
    in_channels=TRANSFORMER["in_channels"],
    out_channels=TRANSFORMER["in_channels"],
    num_attention_heads=2,
    attention_head_dim=32,
    num_cross_attention_heads=4,
    cross_attention_head_dim=16,
    cross_attention_dim=64,
    caption_channels=32,
    sample_size=4,
)


def random(model, std=0.2):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.eval().parameters():
            parameter.copy_(std * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """diffusers' ControlNet of two blocks and transformer of four, and their folders."""
    path = tmp_path_factory.mktemp("models")
    net = random(diffusers.SanaControlNetModel(**OPTIONS, num_layers=2))
    base = random(diffusers.SanaTransformer2DModel(**OPTIONS, num_layers=4))
    net.save_pretrained(path / "controlnet")
    base.save_pretrained(path / "transformer")
    return net, base, path


def inputs():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    mask = np.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.float32)
    return normal(2, 4, 4, 8), np.float32([200, 900]), normal(2, 4, 4, 8), normal(2, 5, 32), mask


def torch_inputs():
    latents, timesteps, hint, text, mask = (torch.from_numpy(x) for x in inputs())
    return latents.permute(0, 3, 1, 2), text, timesteps, hint.permute(0, 3, 1, 2), mask


@pytest.mark.parametrize("apart", [False, True])
def test_residuals_and_velocity_are_those_of_diffusers(models, apart):
    net, base, path = models
    latents, text, timesteps, hint, mask = torch_inputs()
    with torch.no_grad():
        residuals = net(
            latents, text, timesteps, hint, conditioning_scale=0.7, encoder_attention_mask=mask, return_dict=False
        )[0]
        velocity = base(
            latents,
            text,
            timesteps,
            encoder_attention_mask=mask,
            controlnet_block_samples=tuple(residuals),
            return_dict=False,
        )[0]
        plain = base(latents, text, timesteps, encoder_attention_mask=mask, return_dict=False)[0]
    module, params = parts.read(parts.find(parts.CONTROLNET, path / "controlnet"))
    params = jax.tree.map(jnp.asarray, params)
    params = take_apart(params) if apart else params
    latents, timesteps, hint, text, mask = map(jnp.asarray, inputs())
    found = module.apply({"params": params}, latents, timesteps, hint, text, mask)
    for ours, theirs in zip(found, residuals, strict=True):
        assert relative_error(0.7 * ours.reshape(2, 16, -1), theirs.numpy()) < 1e-5
    transformer, weights = parts.load_transformer(path)
    weights = jax.tree.map(jnp.asarray, weights)
    weights = take_apart(weights) if apart else weights
    added = control(Branch(module, params, 0.7, hint, text), latents, timesteps, mask)
    ours = transformer.apply({"params": weights}, latents, timesteps, text, mask, control=added)
    assert relative_error(ours, velocity.numpy().transpose(0, 2, 3, 1)) < 1e-5
    assert relative_error(plain.numpy(), velocity.numpy()) > 0.05


@pytest.fixture(scope="module")
def pipeline(models, tmp_path_factory):
    """diffusers' pipeline of the tiny model with the ControlNet, and its folder."""
    path = tmp_path_factory.mktemp("pipeline")
    pipe = save_tiny(
        diffusers.SanaControlNetPipeline, path, transformer={"num_layers": 4}, controlnet=models[0], std=0.2,
        own={"complex_human_instruction": None, "max_sequence_length": 12},
    )  # fmt: skip
    return pipe, path


@pytest.mark.parametrize(("scale", "guidance"), [(1.0, 4.5), (0.6, 4.5), (1.0, 1.0)])
def test_pictures_are_those_of_diffusers(pipeline, monkeypatch, scale, guidance):
    pipe, path = pipeline
    allow_any_size(monkeypatch, diffusers.SanaControlNetPipeline)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 4, 4, 8)).astype(np.float32)
    pictures = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(2)]
    asked = dict(num_inference_steps=4, guidance_scale=guidance, controlnet_conditioning_scale=scale)
    prompts = ["a red apple", "the quick brown fox"]
    theirs = draw(
        pipe, prompts, noise, control_image=pictures, complex_human_instruction=None, max_sequence_length=12, **asked
    )
    opened = SanaPipeline.from_pretrained(path)
    ours = opened(prompts, latents=noise, control_image=pictures, output_type="latent", **asked)
    assert relative_error(ours, theirs) < 1e-4
    others = opened(prompts, latents=noise, control_image=pictures[::-1], output_type="latent", **asked)
    assert relative_error(others, theirs) > 1e-2


def test_a_saved_folder_opens_in_diffusers(pipeline, monkeypatch, tmp_path):
    pipe, path = pipeline
    SanaPipeline.from_pretrained(path).save_pretrained(tmp_path)
    again = diffusers.SanaControlNetPipeline.from_pretrained(tmp_path)
    for theirs, ours in ((pipe.controlnet, again.controlnet), (pipe.transformer, again.transformer)):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("width", "cross_heads"), [(1152, 16), (2240, 20)])
def test_public_sizes_have_the_tensors_of_diffusers(width, cross_heads):
    fields = dict(num_cross_attention_heads=cross_heads, width=width)
    net = SanaControlNet(ControlNetConfig(**fields))
    options = parts.CONTROLNET.layout.config_to_json(net.config)
    with torch.device("meta"):
        theirs = diffusers.SanaControlNetModel.from_config(options).state_dict()
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), parts.abstract_params(net))
    ours = layout.write(parts.CONTROLNET.layout.entries(net.config), zeros)
    assert {name: tuple(x.shape) for name, x in ours.items()} == {name: tuple(x.shape) for name, x in theirs.items()}
    assert parts.CONTROLNET.layout.config_from_json(options) == net.config
