"""The transformer against diffusers' SanaTransformer2DModel, on tiny models whose every parameter is random."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from parity_errors import relative_error

from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.weights import layout
from sana_jax.weights.parts import abstract_params
from sana_jax.weights.transformer import config_from_json, config_to_json, entries

pytestmark = pytest.mark.parity

TINY = TransformerConfig(
    sample_size=8,
    in_channels=6,
    out_channels=6,
    width=64,
    num_layers=2,
    attention_head_dim=16,
    num_cross_attention_heads=2,
    caption_channels=24,
)
SPRINT = dict(qk_norm=True, guidance_embeds=True, timestep_scale=0.001, integer_timesteps=False)
VARIANTS = {
    "sana": {},
    "sana15": dict(qk_norm=True),
    "sprint": SPRINT,
    "position_table_2k": dict(interpolation_scale=1.0),
    "position_table_4k": dict(interpolation_scale=2.0),
    "patch_2": dict(patch_size=2, interpolation_scale=1.0),
    "fractional_mlp": dict(mlp_ratio=1.3),
}

CHECKPOINTS = {
    "sana": "SANA 0.6B, 1.6B",
    "sana15": "SANA-1.5 1.6B, 4.8B",
    "sprint": "SANA-Sprint 0.6B, 1.6B",
    "position_table_2k": "SANA 1.6B 2K",
    "position_table_4k": "SANA 1.6B 4K",
    "patch_2": "patch size 2 (ablation)",
    "fractional_mlp": "other mlp_ratio (ablation)",
}


@functools.cache
def make_pair(config):
    """A diffusers model with random values everywhere, and the same weights in our layout."""
    torch.manual_seed(0)
    theirs = diffusers.SanaTransformer2DModel.from_config(config_to_json(config)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    return theirs, tensors


def make_inputs(config, height=4, width=10, text_tokens=7):
    rng = np.random.default_rng(1)
    inputs = dict(
        latents=rng.standard_normal((3, height, width, config.in_channels)).astype(np.float32),
        timesteps=np.array([3.0, 420.0, 999.0], np.float32),
        text_features=3 * rng.standard_normal((3, text_tokens, config.caption_channels)).astype(np.float32),
        text_mask=np.ones((3, text_tokens), int),
    )
    inputs["text_mask"][1, 3:] = inputs["text_mask"][2, 1::2] = 0
    if config.guidance_embeds:
        inputs["guidance"] = np.array([1.0, 4.5, 5.0], np.float32)
    return {name: jnp.asarray(value) for name, value in inputs.items()}


def run_theirs(model, config, inputs, dtype=torch.float32):
    inputs = {name: np.array(value) for name, value in inputs.items()}
    kwargs = {}
    if config.guidance_embeds:
        kwargs["guidance"] = torch.tensor(inputs["guidance"]) * config.guidance_embeds_scale
    with torch.no_grad():
        out = model(
            torch.tensor(inputs["latents"], dtype=dtype).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.tensor(inputs["text_features"], dtype=dtype),
            timestep=torch.tensor(inputs["timesteps"]) * config.timestep_scale,
            encoder_attention_mask=torch.tensor(inputs["text_mask"]),
            **kwargs,
        ).sample
    return out.permute(0, 2, 3, 1).numpy()


@functools.cache
def compiled(config):
    return jax.jit(SanaTransformer(config).apply)


def run_ours(config, tensors, inputs):
    params = layout.read(entries(config), tensors, abstract_params(SanaTransformer(config)))
    return np.asarray(compiled(config)({"params": params}, **inputs))


@pytest.mark.parametrize(
    "variant, height, width",
    [(variant, 4, 10) for variant in VARIANTS] + [("sana", 8, 8), ("position_table_2k", 8, 8)],
)
def test_velocity_equals_diffusers(variant, height, width, measured):
    config = dataclasses.replace(TINY, **VARIANTS[variant])
    model, tensors = make_pair(config)
    inputs = make_inputs(config, height, width)
    error = relative_error(run_ours(config, tensors, inputs), run_theirs(model, config, inputs))
    measured(CHECKPOINTS[variant], "velocity, tiny model", error, 5e-5)  # both sum in other orders


@pytest.mark.parametrize("text_tokens", [1, 77, 300])
def test_velocity_equals_diffusers_for_any_length_of_text(text_tokens, measured):
    model, tensors = make_pair(TINY)
    inputs = make_inputs(TINY, text_tokens=text_tokens)
    error = relative_error(run_ours(TINY, tensors, inputs), run_theirs(model, TINY, inputs))
    measured(CHECKPOINTS["sana"], "velocity, tiny model, 1 to 300 text tokens", error, 5e-5)


def test_row_without_any_text_equals_diffusers():
    model, tensors = make_pair(TINY)
    inputs = make_inputs(TINY)
    inputs["text_mask"] = jnp.zeros((3, 7), int)
    # Diffusers' bias of -10000 costs the logits three decimal digits.
    assert relative_error(run_ours(TINY, tensors, inputs), run_theirs(model, TINY, inputs)) < 1e-3


@pytest.mark.parametrize(
    "variant, mutated",
    [
        ("sana", "caption_norm.weight"),
        ("sana", "scale_shift_table"),  # shift and scale of the last layer change places
        ("sana", "transformer_blocks.1.scale_shift_table"),
        ("sana", "transformer_blocks.1.attn1.to_q.weight"),
        ("sana", "transformer_blocks.0.attn2.to_v.bias"),
        ("sana", "transformer_blocks.0.ff.conv_depth.bias"),
        ("sana15", "transformer_blocks.0.attn1.norm_k.weight"),
        ("sana15", "transformer_blocks.1.attn2.norm_q.weight"),
        ("sprint", "time_embed.guidance_embedder.linear_1.weight"),
    ],
)
def test_changing_one_tensor_breaks_parity(variant, mutated):
    config = dataclasses.replace(TINY, **VARIANTS[variant])
    model, tensors = make_pair(config)
    inputs = make_inputs(config)
    theirs = run_theirs(model, config, inputs)
    tensors = {**tensors, mutated: tensors[mutated][::-1].copy()}
    assert relative_error(run_ours(config, tensors, inputs), theirs) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_survives_the_way_through_diffusers(variant):
    config = dataclasses.replace(TINY, **VARIANTS[variant])
    model = diffusers.SanaTransformer2DModel.from_config(config_to_json(config))
    assert config_from_json(dict(model.config)) == config
