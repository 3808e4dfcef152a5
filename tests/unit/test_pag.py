"""Perturbed attention guidance: the formula, the perturbed attention, and how folders name blocks."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from tiny_pipeline import tiny_parts

from sana_jax.diffusion.guidance import guidance_interval, perturbed_attention, perturbed_attention_guidance
from sana_jax.models.attention import SelfAttention
from sana_jax.weights import pag

LATENTS = jnp.arange(8.0).reshape(2, 2, 2, 1)
SETTINGS = dict(scale=2.0, adaptive_scale=0.001, layers=(1,), num_layers=3)


def model(latents, timesteps, condition, perturbed=None):
    """A velocity that tells its branch: the condition's value, and 10 where block 1 is perturbed."""
    if perturbed is None:
        return latents + condition[:, None, None, None]
    assert perturbed.shape == (3, latents.shape[0])
    return latents + (condition + 10.0 * perturbed[1] + 100.0 * perturbed[0])[:, None, None, None]


@pytest.mark.parametrize("timestep,strength", [(1000.0, 2.0), (400.0, 1.4)])
def test_the_strength_fades_with_the_noise(timestep, strength):
    text, null = jnp.array([3.0, 4.0]), jnp.array([1.0, 1.0])
    velocity = perturbed_attention_guidance(model, text, null, 4.0, perturbed_attention(**SETTINGS))
    expected = LATENTS + (null + 4.0 * (text - null) - 10.0 * strength)[:, None, None, None]
    np.testing.assert_allclose(velocity(LATENTS, jnp.full(2, timestep)), expected, rtol=1e-6)


def test_the_strength_never_turns_negative():
    settings = perturbed_attention(**SETTINGS | {"adaptive_scale": 0.1})
    velocity = perturbed_attention_guidance(model, jnp.zeros(2), None, 4.0, settings)
    np.testing.assert_allclose(velocity(LATENTS, jnp.full(2, 500.0)), LATENTS)


def test_without_a_null_text_there_are_two_branches():
    rows = []

    def counting(latents, *args):
        rows.append(latents.shape[0])
        return model(latents, *args)

    text = jnp.array([3.0, 4.0])
    velocity = perturbed_attention_guidance(counting, text, None, 4.0, perturbed_attention(**SETTINGS))
    np.testing.assert_allclose(velocity(LATENTS, jnp.full(2, 1000.0)), LATENTS + text[:, None, None, None] - 20.0)
    assert rows == [4]


def test_pictures_of_one_prompt_share_its_condition():
    latents = jnp.arange(16.0).reshape(4, 2, 2, 1)
    text, null = jnp.array([3.0, 5.0]), jnp.array([1.0, 2.0])

    def shared(latents, timesteps, condition, perturbed):
        return model(latents, timesteps, jnp.repeat(condition, 2), perturbed)

    velocity = perturbed_attention_guidance(shared, text, null, 4.0, perturbed_attention(**SETTINGS))
    expected = latents + jnp.repeat(null + 4.0 * (text - null) - 20.0, 2)[:, None, None, None]
    np.testing.assert_allclose(velocity(latents, jnp.full(4, 1000.0)), expected, rtol=1e-6)


def test_outside_the_interval_neither_guidance_acts():
    text, settings = jnp.array([3.0, 4.0]), perturbed_attention(**SETTINGS)
    velocity = perturbed_attention_guidance(model, text, jnp.zeros(2), 4.0, settings, guidance_interval(0.2, 0.5))
    np.testing.assert_allclose(velocity(LATENTS, jnp.full(2, 800.0)), LATENTS + text[:, None, None, None])
    assert np.abs(velocity(LATENTS, jnp.full(2, 400.0)) - LATENTS).min() > 1


def test_the_settings_take_no_program_of_their_own(caplog):
    with jax.log_compiles(), caplog.at_level("WARNING"):
        settings = perturbed_attention(**SETTINGS | {"num_layers": 29})
    assert "Compiling" not in caplog.text
    np.testing.assert_array_equal(np.flatnonzero(settings.layers), SETTINGS["layers"])


def test_scale_0_is_none():
    assert perturbed_attention(0.0, 0.0, (), 3) is None


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(scale=-1.0), "pag_scale=-1.0 is not a number of at least 0"),
        (dict(scale=float("inf")), "pag_scale=inf"),
        (dict(adaptive_scale=-0.1), "pag_adaptive_scale=-0.1"),
        (dict(layers=()), r"pag_layers=\(\): name at least one of this model's blocks, 0 to 2"),
        (dict(layers=(0, 3)), r"pag_layers=\(0, 3\): name at least one of this model's blocks, 0 to 2"),
        (dict(layers=(-1,)), r"pag_layers=\(-1,\)"),
    ],
)
def test_settings_that_cannot_be_used_are_named(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        perturbed_attention(**SETTINGS | change)


@pytest.mark.parametrize("kind", ["linear", "softmax"])
def test_identity_attention_is_values_then_output_projection(kind):
    attention = SelfAttention(kind, 4, True, 1e-15, False, jnp.dtype("float32"))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    params = attention.init(jax.random.key(0), x)["params"]
    params["out"]["bias"] = jnp.arange(8.0)
    out = attention.apply({"params": params}, x, jnp.array([False, True]))
    values = x[1] @ params["qkv"]["kernel"][:, 2]
    np.testing.assert_allclose(out[1], values @ params["out"]["kernel"] + jnp.arange(8.0), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(out[0], attention.apply({"params": params}, x)[0])


def test_flags_choose_block_and_picture():
    module, params = tiny_parts().transformer
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(2, 4, 4, 8)), jnp.float32)
    text, mask = jnp.asarray(rng.normal(size=(2, 3, 32)), jnp.float32), jnp.ones((2, 3), bool)
    inputs = (latents, jnp.full(2, 500.0), text, mask)
    run = jax.jit(lambda *extra: module.apply({"params": jax.device_put(params)}, *inputs, *extra))
    plain = run()
    results = [run(None, jnp.zeros((2, 2), bool).at[layer, 0].set(True)) for layer in (0, 1)]
    for out in results:
        np.testing.assert_allclose(out[1], plain[1], atol=1e-6)
        assert np.abs(out[0] - plain[0]).max() > 1e-3
    assert np.abs(results[0][0] - results[1][0]).max() > 1e-3


def test_folders_name_blocks_by_regular_expressions():
    def layers(names, count=20):
        return pag.defaults_from_index({"_class_name": "SanaPAGPipeline", "pag_applied_layers": names}, count)[
            "pag_layers"
        ]

    assert layers("transformer_blocks.8") == (8,)
    assert layers(["transformer_blocks.8.attn1", "blocks.(14|3)"]) == (3, 8, 14)
    assert layers("transformer_blocks.1") == (1, *range(10, 20))  # as diffusers takes it
    assert pag.defaults_from_index({"_class_name": "SanaPAGPipeline"}, 4) == {"pag_scale": 3.0, "pag_layers": (0,)}
    assert pag.defaults_from_index({"_class_name": "SanaPipeline"}, 4) == {}
    assert layers(pag.index_entries((1, 11))["pag_applied_layers"]) == (1, 11)
    for names, message in (
        (8, "pag_applied_layers is 8; it is a name of blocks"),
        ([], r"pag_applied_layers is \[\]; it is a name of blocks"),
        ("blocks.20", "names none of the blocks"),
        ("blocks.(", "no regular expression"),
        ([3], "3"),
    ):
        with pytest.raises(ValueError, match=message):
            layers(names)
