"""The diffusion transformer's parts against NumPy, its switches, its errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sana_jax.models.attention import SelfAttention
from sana_jax.models.conditioning import grid_coordinates, position_table, sinusoidal_embedding
from sana_jax.models.layers import take_apart
from sana_jax.models.norms import RMSNorm
from sana_jax.models.transformer import SanaTransformer, TransformerConfig, patchify, text_keys, unpatchify

TINY = TransformerConfig(
    sample_size=4,
    in_channels=5,
    out_channels=5,
    width=32,
    num_layers=2,
    attention_head_dim=8,
    num_cross_attention_heads=2,
    caption_channels=6,
)


def inputs(height=4, width=4, seed=0):
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((2, height, width, 5)).astype(np.float32)
    text = rng.standard_normal((2, 3, 6)).astype(np.float32)
    return map(jnp.asarray, (latents, np.array([10.0, 900.0], np.float32), text, np.array([[1, 1, 0], [1, 1, 1]])))


def randomised(config, **shape):
    """Random values in every parameter, so that nothing starts silent."""
    shapes = jax.eval_shape(SanaTransformer(config).init, jax.random.key(0), *inputs(**shape))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(3)
    return jax.tree.unflatten(tree, [jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32) for x in leaves])


def run(config, params, *arguments):
    return jax.jit(SanaTransformer(config).apply)({"params": params}, *arguments)


def test_timestep_embedding_has_cosines_first():
    t = np.array([0.0, 1.0, 999.0])
    angles = t[:, None] * 10000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(sinusoidal_embedding(jnp.asarray(t), 8), expected, atol=1e-4)


def test_position_table_encodes_the_column_in_its_first_half():
    def coordinates(tokens):
        return grid_coordinates(tokens, base_size=8, interpolation_scale=2.0)

    table = np.asarray(position_table(coordinates(4), coordinates(6), 16))
    omega = 10000.0 ** (-np.arange(4) / 4)
    for row in range(4):
        for column in range(6):
            x, y = column * 8 / 6 / 2.0 * omega, row * 8 / 4 / 2.0 * omega
            expected = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)])
            np.testing.assert_allclose(table[row, column], expected, atol=1e-5)


def test_rms_norm_divides_by_the_root_mean_square():
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    scale = np.arange(8, dtype=np.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    for zero_centred in (False, True):
        y = RMSNorm(1e-5, zero_centred).apply({"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x))
        np.testing.assert_allclose(y, expected * (scale + zero_centred), rtol=1e-5, atol=1e-6)


def test_gradient_of_a_norms_scale_is_the_sum_over_positions():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 8)), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((4, 6, 8)), jnp.float32)
    gradient = jax.grad(lambda s: (weights * RMSNorm().apply({"params": {"scale": s}}, x)).sum())(jnp.ones(8))
    normalised = np.asarray(x) / np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(gradient, (normalised * np.asarray(weights)).sum((0, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", [1, 2])
def test_unpatchify_inverts_patchify(patch):
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    np.testing.assert_array_equal(unpatchify(patchify(x, patch), patch), x)


def test_masked_text_tokens_have_no_influence():
    params = randomised(TINY)
    latents, timesteps, text, mask = inputs()
    changed = text.at[0, 2].add(5.0)
    np.testing.assert_allclose(
        run(TINY, params, latents, timesteps, text, mask),
        run(TINY, params, latents, timesteps, changed, mask),
        atol=1e-5,
    )


def test_a_text_that_is_all_masked_gives_finite_velocities():
    latents, timesteps, text, mask = inputs()
    assert np.isfinite(run(TINY, randomised(TINY), latents, timesteps, text, 0 * mask)).all()


def test_integer_timesteps_are_truncated_and_continuous_ones_are_not():
    latents, timesteps, text, mask = inputs()
    for integer in (True, False):
        config = dataclasses.replace(TINY, integer_timesteps=integer)
        params = randomised(config)
        same = np.allclose(
            run(config, params, latents, timesteps, text, mask),
            run(config, params, latents, timesteps + 0.7, text, mask),
        )
        assert same == integer


def test_unrolling_the_scan_changes_no_gradient():
    params, arguments = randomised(TINY), list(inputs())

    def gradient(config):
        return jax.jit(jax.grad(lambda p: (SanaTransformer(config).apply({"params": p}, *arguments) ** 2).mean()))(
            params
        )

    for mine, other in zip(
        *map(jax.tree.leaves, (gradient(TINY), gradient(dataclasses.replace(TINY, unroll=2)))), strict=True
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("implementation", "kernels"), [("auto", 0), ("xla", 0), ("pallas_gpu", 4)])
def test_the_configuration_chooses_the_implementation_of_attention_on_a_gpu(implementation, kernels):
    kind = dict(attention_implementation=implementation, feed_forward="gelu_mlp", dtype="bfloat16")
    config = dataclasses.replace(TINY, width=128, attention_head_dim=32, **kind)
    module, arguments = SanaTransformer(config), list(inputs(8, 8))
    params = jax.eval_shape(module.init, jax.random.key(0), *arguments)
    gradient = jax.grad(lambda params: module.apply(params, *arguments).mean())
    lowered = jax.jit(gradient).trace(params).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == kernels  # both halves and their derivatives


@pytest.mark.parametrize(("implementation", "kernels"), [("auto", 0), ("xla", 0), ("pallas_gpu", 1)])
def test_the_configuration_chooses_the_implementation_of_the_mix_ffn_on_a_gpu(implementation, kernels):
    config = dataclasses.replace(TINY, feed_forward_implementation=implementation, dtype="bfloat16")
    module, arguments = SanaTransformer(config), list(inputs(8, 8))
    params = jax.eval_shape(module.init, jax.random.key(0), *arguments)
    lowered = jax.jit(module.apply).trace(params, *arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == kernels


@pytest.mark.parametrize(
    "change", [dict(self_attention="softmax"), dict(feed_forward="gelu_mlp"), dict(patch_size=2), dict(qk_norm=True)]
)
def test_an_ablation_keeps_the_output_shape_and_changes_the_output(change):
    config = dataclasses.replace(TINY, **change)
    arguments = list(inputs())
    output = run(config, randomised(config), *arguments)
    assert output.shape == arguments[0].shape
    assert not np.allclose(output, run(TINY, randomised(TINY), *arguments), atol=1e-3)


def test_bfloat16_computation_stays_near_float32():
    params, arguments = randomised(TINY), list(inputs())
    exact = np.asarray(run(TINY, params, *arguments))
    rounded = np.asarray(run(dataclasses.replace(TINY, dtype="bfloat16"), params, *arguments))
    assert rounded.dtype == np.float32
    assert np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attention_head_dim=5), "attention_head_dim=5 does not divide width=32"),
        (dict(num_cross_attention_heads=3), "num_cross_attention_heads=3 does not divide width=32"),
        (dict(self_attention="full"), "self_attention='full' is unknown; use one of linear, softmax"),
        (
            dict(attention_implementation="cuda"),
            "'cuda' is unknown; use one of auto, xla, xla_wide, pallas_tpu, pallas_gpu",
        ),
        (
            dict(attention_implementation="xla", self_attention="softmax"),
            "attention_implementation='xla' is of linear attention, and self_attention='softmax'",
        ),
        (
            dict(feed_forward_implementation="xla", feed_forward="gelu_mlp"),
            "feed_forward_implementation='xla' is of the Mix-FFN, and feed_forward='gelu_mlp'",
        ),
        (dict(patch_size=3), "patch_size=3 does not divide sample_size=4"),
        (dict(patch_size=0), "patch_size=0 must be at least 1"),
        (dict(num_layers=0), "num_layers=0 must be at least 1"),
        (dict(num_cross_attention_heads=-4), "num_cross_attention_heads=-4 must be at least 1"),
        (dict(mlp_ratio=-1.0), "mlp_ratio=-1.0 must be above 0"),
        (dict(timestep_scale=0.0), "timestep_scale=0.0 must be above 0"),
        (dict(interpolation_scale=0.0), "interpolation_scale=0.0 must be above 0"),
        (dict(attention_eps=float("nan")), "attention_eps=nan must be above 0"),
        (dict(remat="all"), "remat='all' is unknown"),
    ],
)
def test_an_impossible_configuration_is_refused_with_its_value_and_rule(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_a_call_that_does_not_fit_the_configuration_is_refused():
    latents, timesteps, text, mask = inputs()
    with pytest.raises(ValueError, match="latents have 4 channels and the model takes 5"):
        SanaTransformer(TINY).init(jax.random.key(0), latents[..., :4], timesteps, text, mask)
    with pytest.raises(ValueError, match="guidance_embeds=False but the call gives guidance"):
        SanaTransformer(TINY).init(jax.random.key(0), latents, timesteps, text, mask, timesteps)
    with pytest.raises(ValueError, match="2 texts do not divide 3 latents; give each text as many latents"):
        SanaTransformer(TINY).init(jax.random.key(0), jnp.repeat(latents[:1], 3, 0), jnp.zeros(3), text, mask)


@pytest.mark.parametrize("clamp", [False, True])
def test_the_clamp_ends_self_attention_at_the_largest_float16(clamp):
    attention = SelfAttention("linear", 8, qk_norm=False, eps=1e-15, clamp=clamp, dtype=jnp.dtype("float32"))
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    params = attention.init(jax.random.key(1), x)["params"]
    params["out"]["kernel"] *= 1e6
    largest = np.abs(attention.apply({"params": params}, x)).max()
    assert largest == 65504 if clamp else largest > 65504


SPRINT = dataclasses.replace(TINY, width=256, qk_norm=True, guidance_embeds=True)
UNIFORM = {  # bounds
    # Xavier: sqrt(6 / (fan_in + fan_out)) of the public code's matrices.
    "patch_embed/kernel": (6 / (5 + 256)) ** 0.5,
    "proj_out/kernel": (6 / (256 + 5)) ** 0.5,
    "blocks/self_attention/qkv/kernel": (6 / (256 + 3 * 256)) ** 0.5,
    "blocks/self_attention/out/kernel": (6 / (256 + 256)) ** 0.5,
    "blocks/cross_attention/query/kernel": (6 / (256 + 256)) ** 0.5,
    "blocks/cross_attention/kv/kernel": (6 / (256 + 2 * 256)) ** 0.5,
    "blocks/cross_attention/out/kernel": (6 / (256 + 256)) ** 0.5,
    # PyTorch's default of convolutions: 1 / sqrt(fan_in).
    "blocks/feed_forward/expand/kernel": 256**-0.5,
    "blocks/feed_forward/expand/bias": 256**-0.5,
    "blocks/feed_forward/depthwise/kernel": 9**-0.5,
    "blocks/feed_forward/depthwise/bias": 9**-0.5,
    "blocks/feed_forward/project/kernel": 640**-0.5,
}
NORMAL = {
    "time_embed/linear_1/kernel": 0.02,
    "time_embed/linear_2/kernel": 0.02,
    "guidance_embed/linear_1/kernel": 0.02,
    "modulation/kernel": 0.02,
    "caption/linear_1/kernel": 0.02,
    "caption/linear_2/kernel": 0.02,
    "blocks/scale_shift_table": 256**-0.5,
    "scale_shift_table": 256**-0.5,
}


def test_every_parameter_starts_as_in_the_public_code():
    arguments = (*inputs(), jnp.ones(2))
    params = jax.jit(SanaTransformer(SPRINT).init)(jax.random.key(0), *arguments)["params"]
    for name, value in traverse_util.flatten_dict(params, sep="/").items():
        value = np.asarray(value)
        if name in UNIFORM:
            assert 0.97 * UNIFORM[name] < np.abs(value).max() <= UNIFORM[name], name
            assert value.std() == pytest.approx(UNIFORM[name] / 3**0.5, rel=0.05), name
        elif name in NORMAL:
            assert value.std() == pytest.approx(NORMAL[name], rel=0.1), name
            assert np.abs(value).max() > 2.5 * NORMAL[name], name
        else:
            constant = 0.01 if name == "caption/norm/scale" else 1.0 if name.endswith("scale") else 0.0
            assert np.all(value == np.float32(constant)), name


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_keys_of_the_text_made_once_give_the_velocities_that_its_features_give(qk_norm, apart):
    config = dataclasses.replace(TINY, qk_norm=qk_norm)
    params = take_apart(randomised(config)) if apart else randomised(config)
    latents, timesteps, text, mask = inputs()
    keys = text_keys(config, params, text)
    shapes = [x.shape for x in jax.tree.leaves(keys)]
    assert shapes == [(2, 3, 32)] * 4 if apart else shapes == [(2, 2, 3, 32)] * 2
    expected = run(config, params, latents, timesteps, text, mask)
    np.testing.assert_allclose(run(config, params, latents, timesteps, keys, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_pictures_next_to_each_other_share_a_text(qk_norm, apart):
    config = dataclasses.replace(TINY, qk_norm=qk_norm)
    params = take_apart(randomised(config)) if apart else randomised(config)
    latents, timesteps, text, mask = inputs()
    latents, timesteps = (jnp.concatenate([x, x[::-1] + 1, x * 2]) for x in (latents, timesteps))
    found = run(config, params, latents, timesteps, text_keys(config, params, text), mask)
    each = run(config, params, latents, timesteps, jnp.repeat(text, 3, axis=0), jnp.repeat(mask, 3, axis=0))
    np.testing.assert_allclose(found, each, rtol=1e-5, atol=1e-5)
