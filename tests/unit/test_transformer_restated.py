"""The velocity of a whole transformer against a NumPy restatement in float64 (SANA section 2.2)."""

import dataclasses

import jax
import numpy as np
import pytest
from test_transformer import TINY, inputs, run

from sana_jax.models.transformer import SanaTransformer

QK_NORM = dataclasses.replace(TINY, qk_norm=True)
SPRINT = dataclasses.replace(
    QK_NORM, guidance_embeds=True, timestep_scale=0.001, integer_timesteps=False, cross_norm_eps=1e-6
)
TIMESTEPS, GUIDANCE = np.array([10.4, 90.7], np.float32), np.array([1.0, 4.5], np.float32)
# What a norm takes in is so small that its epsilon counts.
STD = {
    "patch_embed": 3e-3,
    "qkv": 3e-3,
    "query": 3e-3,
    "kv": 3e-3,
    "caption/linear_2": 3e-3,
    "attention/out/kernel": 30,
}


def random_params(config):
    """Random values in every parameter, of a deviation by its name."""
    arguments = (*inputs(), GUIDANCE) if config.guidance_embeds else inputs()
    shapes = jax.eval_shape(SanaTransformer(config).init, jax.random.key(0), *arguments)["params"]
    rng = np.random.default_rng(5)

    def draw(path, x):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        std = next((std for name, std in STD.items() if name in path), 0.3)
        return (std * rng.standard_normal(x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def rms_norm(x, p, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"]


def layer_norm(x, shift, scale):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale) + shift


def embedded(number, p):
    angles = number * 10000.0 ** (-np.arange(128) / 128)
    waves = np.concatenate([np.cos(angles), np.sin(angles)])
    return linear(silu(linear(waves, p["linear_1"])), p["linear_2"])


def self_attention(x, p, c):
    q, k, v = (x @ p["qkv"]["kernel"][:, index] for index in range(3))
    if c.qk_norm:
        q, k = rms_norm(q, p["norm_q"], 1e-5), rms_norm(k, p["norm_k"], 1e-5)
    found = np.zeros_like(x)
    for first in range(0, c.width, c.attention_head_dim):
        head = slice(first, first + c.attention_head_dim)
        weights = np.maximum(q[:, head], 0) @ np.maximum(k[:, head], 0).T
        found[:, head] = weights @ v[:, head] / (weights.sum(1, keepdims=True) + c.attention_eps)
    return linear(found, p["out"])


def cross_attention(x, text, p, c):
    q = linear(x, p["query"])
    k, v = (text @ p["kv"]["kernel"][:, index] + p["kv"]["bias"][index] for index in range(2))
    if c.qk_norm:
        q, k = rms_norm(q, p["norm_q"], c.cross_norm_eps), rms_norm(k, p["norm_k"], c.cross_norm_eps)
    found, size = np.zeros_like(x), c.width // c.num_cross_attention_heads
    for first in range(0, c.width, size):
        head = slice(first, first + size)
        weights = np.exp(q[:, head] @ k[:, head].T / np.sqrt(size))
        found[:, head] = weights @ v[:, head] / weights.sum(1, keepdims=True)
    return linear(found, p["out"])


def feed_forward(x, p, height, width):
    y = np.pad(silu(linear(x, p["expand"])).reshape(height, width, -1), ((1, 1), (1, 1), (0, 0)))
    kernel, convolved = p["depthwise"]["kernel"], p["depthwise"]["bias"]
    for row in range(3):
        for column in range(3):
            convolved = convolved + y[row : row + height, column : column + width] * kernel[row, column]
    value, gate = np.split(convolved.reshape(len(x), -1), 2, axis=1)
    return linear(value * silu(gate), p["project"])


def restated_velocity(latents, timestep, text, guidance, p, c):
    """Of one picture [H, W, C] and its text [L, D] without padding."""
    height, width, channels = latents.shape
    x = linear(latents.reshape(-1, channels), p["patch_embed"])
    condition = embedded((np.trunc(timestep) if c.integer_timesteps else timestep) * c.timestep_scale, p["time_embed"])
    if c.guidance_embeds:
        condition = condition + embedded(guidance * 0.1, p["guidance_embed"])
    modulation = linear(silu(condition), p["modulation"]).reshape(6, c.width)
    caption = p["caption"]
    text = rms_norm(linear(gelu(linear(text, caption["linear_1"])), caption["linear_2"]), caption["norm"], 1e-5)
    for layer in range(c.num_layers):
        block = jax.tree.map(lambda a, layer=layer: a[layer], p["blocks"])
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block["scale_shift_table"] + modulation
        x = x + gate_1 * self_attention(layer_norm(x, shift_1, scale_1), block["self_attention"], c)
        x = x + cross_attention(x, text, block["cross_attention"], c)
        x = x + gate_2 * feed_forward(layer_norm(x, shift_2, scale_2), block["feed_forward"], height, width)
    shift, scale = p["scale_shift_table"] + condition
    return linear(layer_norm(x, shift, scale), p["proj_out"]).reshape(height, width, -1)


@pytest.mark.parametrize("config", [TINY, QK_NORM, SPRINT], ids=["sana", "qk_norm", "sprint"])
def test_velocities_equal_the_numpy_restatement(config):
    params = random_params(config)
    latents, _, text, mask = inputs(height=4, width=6)
    guidance = [GUIDANCE] if config.guidance_embeds else []
    found = run(config, params, latents, TIMESTEPS, text, mask, *guidance)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for row in range(2):
        valid = np.asarray(text[row], np.float64)[np.asarray(mask[row]) != 0]
        picture, timestep = np.asarray(latents[row], np.float64), np.float64(TIMESTEPS[row])
        expected = restated_velocity(picture, timestep, valid, np.float64(GUIDANCE[row]), exact, config)
        np.testing.assert_allclose(found[row], expected, atol=3e-5 * np.abs(expected).max())
