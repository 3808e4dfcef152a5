"""Native `.pth` files against diffusers: one model's weights in both layouts, the one converted to the other here."""

import dataclasses
import functools
import random

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import jax
from parity_errors import relative_error

import sana_jax
from sana_jax.models.transformer import TransformerConfig
from sana_jax.weights.transformer import config_to_json

pytestmark = pytest.mark.parity

SANA = TransformerConfig(
    sample_size=32, in_channels=6, out_channels=6, width=64, num_layers=2, num_cross_attention_heads=2, caption_channels=24
)  # fmt: skip
SPRINT = dataclasses.replace(SANA, qk_norm=True, guidance_embeds=True, timestep_scale=0.001, integer_timesteps=False)
VARIANTS = {"sana": SANA, "sana15": dataclasses.replace(SANA, qk_norm=True), "sprint": SPRINT}
DIFFUSERS_EPS = dict(attention_eps=1e-15, cross_norm_eps=1e-5)


def native_state_dict(theirs, sprint):
    """What the original code would have saved: the names and fusions of NVlabs/Sana, not by our tables."""
    d = dict(theirs.state_dict())
    native = {}

    def rename(old, new):
        for kind in ("weight", "bias"):
            if f"{old}.{kind}" in d:
                native[f"{new}.{kind}"] = d.pop(f"{old}.{kind}")

    time = "time_embed" if sprint else "time_embed.emb"
    rename("patch_embed.proj", "x_embedder.proj")
    rename("caption_projection.linear_1", "y_embedder.y_proj.fc1")
    rename("caption_projection.linear_2", "y_embedder.y_proj.fc2")
    rename("caption_norm", "attention_y_norm")
    rename(f"{time}.timestep_embedder.linear_1", "t_embedder.mlp.0")
    rename(f"{time}.timestep_embedder.linear_2", "t_embedder.mlp.2")
    rename("time_embed.guidance_embedder.linear_1", "cfg_embedder.mlp.0")
    rename("time_embed.guidance_embedder.linear_2", "cfg_embedder.mlp.2")
    rename("time_embed.linear", "t_block.1")
    rename("proj_out", "final_layer.linear")
    native["final_layer.scale_shift_table"] = d.pop("scale_shift_table")
    for i in range(2):
        old, new = f"transformer_blocks.{i}", f"blocks.{i}"
        native[f"{new}.scale_shift_table"] = d.pop(f"{old}.scale_shift_table")
        native[f"{new}.attn.qkv.weight"] = torch.cat([d.pop(f"{old}.attn1.to_{x}.weight") for x in "qkv"])
        for kind in ("weight", "bias"):
            kv = [d.pop(f"{old}.attn2.to_{x}.{kind}") for x in "kv"]
            native[f"{new}.cross_attn.kv_linear.{kind}"] = torch.cat(kv)
        rename(f"{old}.attn1.to_out.0", f"{new}.attn.proj")
        rename(f"{old}.attn2.to_q", f"{new}.cross_attn.q_linear")
        rename(f"{old}.attn2.to_out.0", f"{new}.cross_attn.proj")
        for x in "qk":
            rename(f"{old}.attn1.norm_{x}", f"{new}.attn.{x}_norm")
            rename(f"{old}.attn2.norm_{x}", f"{new}.cross_attn.{x}_norm")
        rename(f"{old}.ff.conv_inverted", f"{new}.mlp.inverted_conv.conv")
        rename(f"{old}.ff.conv_depth", f"{new}.mlp.depth_conv.conv")
        rename(f"{old}.ff.conv_point", f"{new}.mlp.point_conv.conv")
    assert not d
    native["y_embedder.y_embedding"] = torch.randn(300, 24)
    native["pos_embed"] = torch.zeros(1, 32 * 32, 64)
    return native


@pytest.fixture(scope="module", params=VARIANTS)
def model(request, tmp_path_factory):
    config = VARIANTS[request.param]
    torch.manual_seed(0)
    theirs = diffusers.SanaTransformer2DModel.from_config(config_to_json(config)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
    root = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(root / "diffusers")
    native = native_state_dict(theirs, config.guidance_embeds)
    checkpoint = {
        "state_dict": native,
        "epoch": 3,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "rng_state": {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()},
    }
    torch.save(checkpoint, root / "native.pth")
    return config, theirs, native, root


def load_native(root, file="native.pth", **fields):
    return sana_jax.load_transformer(root / file, num_cross_attention_heads=2, **fields)


@functools.cache
def compiled(module):
    return jax.jit(module.apply)


def outputs(config, theirs, root, module, params):
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((2, 4, 6, 6)).astype(np.float32)
    times = np.array([7.0, 900.0], np.float32)
    text = rng.standard_normal((2, 5, 24)).astype(np.float32)
    mask = np.array([[1] * 5, [1, 1, 0, 0, 0]])
    ours = [latents, times, text, mask]
    kwargs = {}
    if config.guidance_embeds:
        ours.append(np.array([4.5, 1.0], np.float32))
        kwargs["guidance"] = torch.tensor(ours[-1]) * config.guidance_embeds_scale
    with torch.no_grad():
        expected = theirs(
            torch.tensor(latents).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.tensor(text),
            timestep=torch.tensor(times) * config.timestep_scale,
            encoder_attention_mask=torch.tensor(mask),
            **kwargs,
        ).sample
    found = compiled(module)({"params": params}, *map(jnp.asarray, ours))
    return np.asarray(found), expected.permute(0, 2, 3, 1).numpy()


def test_a_native_file_gives_the_parameters_and_the_output_of_the_diffusers_folder(model, measured):
    config, theirs, _, root = model
    module, params = load_native(root, **DIFFUSERS_EPS)
    reference, expected = sana_jax.load_transformer(root / "diffusers")
    assert module == reference
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    error = relative_error(*outputs(config, theirs, root, module, params))
    measured("SANA, files of the original code", "velocity, tiny model", error, 1e-5)


def test_the_switches_are_the_original_codes_unless_asked_otherwise(model):
    config, theirs, _, root = model
    module, params = load_native(root)
    assert (module.config.attention_eps, module.config.cross_norm_eps) == (1e-8, 1e-6)
    assert relative_error(*outputs(config, theirs, root, module, params)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read(model, dtype):
    native, root = model[2:]
    torch.save({name: x.to(dtype) for name, x in native.items()}, root / "half.pth")
    params = load_native(root, "half.pth")[1]
    expected = sana_jax.load_transformer(root / "diffusers")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), params, expected)


def test_swapping_key_and_value_in_the_fused_matrix_breaks_parity(model):
    config, theirs, native, root = model
    q, k, v = native["blocks.0.attn.qkv.weight"].chunk(3)
    torch.save({**native, "blocks.0.attn.qkv.weight": torch.cat([q, v, k])}, root / "mutated.pth")
    assert relative_error(*outputs(config, theirs, root, *load_native(root, "mutated.pth", **DIFFUSERS_EPS))) > 1e-3
