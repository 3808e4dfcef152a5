"""The Gemma decoder stack against a NumPy restatement, its invariants, sizes and configuration files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sana_jax.models import presets
from sana_jax.models.text_encoder import TextEncoder, TextEncoderConfig, prefix_shapes
from sana_jax.weights import layout
from sana_jax.weights import text_encoder as weights

GEMMA2 = TextEncoderConfig(
    vocab_size=31,
    hidden_size=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=20,
    sliding_window=3,
    query_pre_attn_scalar=5,
    attn_logit_softcap=1.5,
)
GEMMA3 = dataclasses.replace(
    GEMMA2, attn_logit_softcap=None, qk_norm=True, rope_theta=900.0, rope_local_theta=40.0, sliding_pattern=3
)
LENGTHS = np.array([8, 5])
MASK = np.arange(8) < LENGTHS[:, None]
IDS = np.where(MASK, np.random.default_rng(0).integers(5, 31, MASK.shape), 0).astype(np.int32)


def random_params(config, seed=0):
    """Random values in every parameter, the norms' zero-initialised scales included."""
    shapes = jax.eval_shape(TextEncoder(config).init, jax.random.key(0), IDS, MASK)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (rng.normal(size=s.shape) * 0.5).astype(np.float32), shapes)


@functools.cache
def compiled(config):
    return jax.jit(TextEncoder(config).apply)


def encode(config, params, ids=IDS, mask=MASK):
    return np.asarray(compiled(config)({"params": params}, ids, mask))


@functools.cache
def compiled_gradient(config):
    """Gradient of the mean cubed state."""

    def loss(params, ids, mask):
        return (TextEncoder(config).apply({"params": params}, ids, mask) ** 3).mean()

    return jax.jit(jax.grad(loss))


def restated_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (1 + scale)


def restated_rotation(vector, position, theta):
    """Complex form: the pair (x_i, x_{i+d/2}) times exp(i * position * theta^(-2i/d))."""
    half = len(vector) // 2
    angles = position * theta ** (-2 * np.arange(half) / len(vector))
    turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag])


def restated_layer(x, p, c, slides):
    """One layer on one prompt [L, D] without padding, query by query and head by head."""
    theta = c.rope_local_theta if slides and c.rope_local_theta is not None else c.rope_theta
    h = restated_norm(x, p["norm_attention_in"]["scale"], c.rms_eps)
    projected = {}
    for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
        value = (h @ p["attention"][name]["kernel"]).reshape(len(x), heads, c.head_dim)
        if c.qk_norm and name != "v":
            value = restated_norm(value, p["attention"][f"norm_{name}"]["scale"], c.rms_eps)
        if name != "v":
            value = np.array([[restated_rotation(head, t, theta) for head in heads_] for t, heads_ in enumerate(value)])
        projected[name] = value
    mixed = np.zeros((len(x), c.num_heads, c.head_dim))
    for head in range(c.num_heads):
        shared = head // (c.num_heads // c.num_kv_heads)
        for i in range(len(x)):
            first = max(0, i - c.sliding_window + 1) if slides else 0
            scores = projected["k"][first : i + 1, shared] @ projected["q"][i, head] / np.sqrt(c.query_pre_attn_scalar)
            if c.attn_logit_softcap is not None:
                scores = c.attn_logit_softcap * np.tanh(scores / c.attn_logit_softcap)
            weight = np.exp(scores) / np.exp(scores).sum()
            mixed[i, head] = weight @ projected["v"][first : i + 1, shared]
    h = mixed.reshape(len(x), -1) @ p["attention"]["out"]["kernel"]
    x = x + restated_norm(h, p["norm_attention_out"]["scale"], c.rms_eps)
    h = restated_norm(x, p["norm_mlp_in"]["scale"], c.rms_eps)
    gate, up = (h @ p["mlp"][name]["kernel"] for name in ("gate", "up"))
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return x + restated_norm((gelu * up) @ p["mlp"]["down"]["kernel"], p["norm_mlp_out"]["scale"], c.rms_eps)


def restated_encoder(ids, params, c, slides):
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = params["embedding"]["embedding"][ids] * np.sqrt(c.hidden_size)
    for layer in range(c.num_layers):
        x = restated_layer(x, jax.tree.map(lambda a, layer=layer: a[layer], params["layers"]), c, slides[layer])
    return restated_norm(x, params["norm"]["scale"], c.rms_eps)


@pytest.mark.parametrize(
    ("config", "slides"), [(GEMMA2, (True, False, True)), (GEMMA3, (True, True, False))], ids=["gemma2", "gemma3"]
)
def test_hidden_states_equal_the_numpy_restatement(config, slides):
    params = random_params(config)
    hidden = encode(config, params)
    for row, length in enumerate(LENGTHS):
        expected = restated_encoder(IDS[row, :length], params, config, slides)
        np.testing.assert_allclose(hidden[row, :length], expected, rtol=2e-4, atol=2e-5)


def test_a_later_token_does_not_change_an_earlier_state():
    params, changed = random_params(GEMMA2), IDS.copy()
    changed[:, 4] = 29
    before, after = encode(GEMMA2, params), encode(GEMMA2, params, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4] - after[:, 4]).max() > 0.01


def test_more_padding_changes_no_valid_state():
    params = random_params(GEMMA3)
    wide_ids, wide_mask = np.pad(IDS, ((0, 0), (0, 6))), np.pad(MASK, ((0, 0), (0, 6)))
    wide = encode(GEMMA3, params, wide_ids, wide_mask)
    np.testing.assert_allclose(wide[:, :8][MASK], encode(GEMMA3, params)[MASK], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [GEMMA2, GEMMA3], ids=["gemma2", "gemma3"])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_prefix_encoded_once_changes_no_state(config, length):
    """Shorter and longer than the window of 3, which cuts through the prefix, the rest and their seam."""
    params, module = random_params(config), TextEncoder(config)
    ids = IDS.copy()
    ids[:, :length] = IDS[0, :length]
    expected = encode(config, params, ids)
    run = jax.jit(functools.partial(module.apply, {"params": jax.device_put(params)}), static_argnames="method")
    prefix = run(ids[0, :length], method="encode_prefix")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), prefix) == jax.tree.map(
        lambda x: (x.shape, x.dtype), prefix_shapes(config, length)
    )
    rest = np.asarray(run(ids[:, length:], MASK[:, length:], prefix))
    np.testing.assert_allclose(rest[MASK[:, length:]], expected[:, length:][MASK[:, length:]], atol=1e-5)
    np.testing.assert_allclose(np.asarray(prefix.hidden)[0], expected[0, :length], atol=1e-5)
    # The mutation: positions that begin anew after the prefix.
    shifted = np.asarray(run(ids[:, length:], MASK[:, length:]))
    assert np.abs(shifted - expected[:, length:])[MASK[:, length:]].max() > 1e-2


def test_padding_beyond_the_window_keeps_states_and_gradients_finite():
    params, mask = random_params(GEMMA2), np.arange(8)[None] < np.array([[1], [2]])
    assert np.isfinite(encode(GEMMA2, params, mask=mask)).all()
    gradient = compiled_gradient(GEMMA2)(params, IDS, mask)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_remat_changes_no_gradient(remat):
    params = random_params(GEMMA2)
    plain = compiled_gradient(GEMMA2)(params, IDS, MASK)
    again = compiled_gradient(dataclasses.replace(GEMMA2, remat=remat))(params, IDS, MASK)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), plain, again)


def test_bfloat16_compute_stays_near_float32():
    params = random_params(GEMMA2)
    low = encode(dataclasses.replace(GEMMA2, dtype="bfloat16"), params)
    assert low.dtype == jnp.bfloat16
    exact = encode(GEMMA2, params)
    assert np.abs(low.astype(np.float32) - exact)[MASK].mean() < 0.03 * np.abs(exact[MASK]).mean()


def test_initialisation_gives_scaled_embeddings_of_unit_variance_and_a_gradient_to_every_parameter():
    config = dataclasses.replace(GEMMA2, vocab_size=200, hidden_size=64, mlp_dim=128)
    ids = np.arange(200, dtype=np.int32).reshape(2, 100)
    mask = np.ones_like(ids)
    params = jax.jit(TextEncoder(config).init)(jax.random.key(0), ids, mask)["params"]
    assert abs(np.std(params["embedding"]["embedding"]) * 8 - 1) < 0.02
    gradient = traverse_util.flatten_dict(compiled_gradient(config)(params, ids, mask), sep="/")
    assert not [path for path, value in gradient.items() if np.abs(value).max() == 0]


# Restated from the published sizes: embeddings + layers * (projections + GeGLU + norms) + final norm.
COUNTS = {
    "gemma2_2b": 256_000 * 2304 + 26 * (2304 * 256 * (8 + 4 + 4 + 8) + 3 * 2304 * 9216 + 4 * 2304) + 2304,
    "gemma3_270m": 262_144 * 640 + 18 * (640 * 256 * (4 + 1 + 1 + 4) + 3 * 640 * 2048 + 4 * 640 + 2 * 256) + 640,
    "gemma2_tiny": 4096 * 256 + 3 * (256 * 64 * (4 + 2 + 2 + 4) + 3 * 256 * 512 + 4 * 256) + 256,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_presets(name):
    config = getattr(presets, name)()
    shapes = jax.eval_shape(TextEncoder(config).init, jax.random.key(0), IDS, MASK)["params"]
    assert sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(shapes)) == COUNTS[name]


def test_gemma2_2b_has_the_published_number_of_parameters():
    assert COUNTS["gemma2_2b"] == 2_614_341_888


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"head_dim": 5}, "head_dim=5 is odd"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 must be above 0"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be above 0"),
        ({"rms_eps": -1.0}, "rms_eps=-1.0 must be above 0"),
        ({"attn_logit_softcap": 0.0}, "None switches it off"),
        ({"dtype": "float16"}, "dtype='float16' is unknown; use float32 or bfloat16"),
        ({"remat": "cross_attention"}, "remat='cross_attention' is unknown.*joined by . .attention, feed_forward"),
    ],
)
def test_an_impossible_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GEMMA2, **change)


@pytest.mark.parametrize("config", [GEMMA2, GEMMA3], ids=["gemma2", "gemma3"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_written_and_read_again_are_the_same(config, prefix):
    params = random_params(config)
    written = {prefix + name: value for name, value in layout.write(weights.entries(config), params).items()}
    written["lm_head.weight"] = np.zeros((31, 12), np.float32)
    read = layout.read(weights.entries(config), weights.canonical(written), params)
    jax.tree.map(np.testing.assert_array_equal, params, read)


@pytest.mark.parametrize(
    "config", [GEMMA2, GEMMA3, presets.gemma2_2b(), presets.gemma3_270m(), presets.gemma2_tiny(num_layers=1)]
)
def test_config_json_written_and_read_again_is_the_same(config):
    assert weights.config_from_json(weights.config_to_json(config)) == config


# config.json of the public Gemma-2-2b-it, as far as it describes the model.
GEMMA2_JSON = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}


def test_the_public_gemma2_config_is_the_preset():
    assert weights.config_from_json(GEMMA2_JSON) == presets.gemma2_2b()


def test_without_a_pattern_every_sixth_layer_of_gemma3_attends_to_all_tokens():
    values = weights.config_to_json(dataclasses.replace(GEMMA3, num_layers=12))
    for key in ("layer_types", "sliding_window_pattern", "_sliding_window_pattern"):
        values.pop(key, None)
    assert weights.config_from_json(values).sliding_pattern == 6


def test_both_spellings_of_gemma3_rotary_bases_are_read():
    sizes = {key: value for key, value in weights.config_to_json(GEMMA3).items() if not key.startswith("rope")}
    full, local = ({"rope_type": "default", "rope_theta": theta} for theta in (900.0, 40.0))
    nested = {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    assert weights.config_from_json(sizes | nested) == GEMMA3
    assert weights.config_from_json(sizes | {"rope_theta": 900.0, "rope_local_base_freq": 40.0}) == GEMMA3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'; implemented are gemma2 and gemma3_text"),
        ({"num_experts": 4}, "unknown keys: 'num_experts'"),
        ({"attention_bias": True}, "attention_bias=True; this model implements only False"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"layer_types": ["full_attention"] + ["sliding_attention"] * 25}, "every n-th of the 26 layers"),
    ],
)
def test_a_config_json_of_something_else_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        weights.config_from_json(GEMMA2_JSON | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"qk_norm": True}, "Gemma-3 has no soft-cap"), ({"rope_local_theta": 7.0}, "Gemma-2 has one rotary base")],
)
def test_a_mixture_of_gemma2_and_gemma3_is_not_written(change, message):
    with pytest.raises(ValueError, match=message):
        weights.config_to_json(dataclasses.replace(GEMMA2, **change))
