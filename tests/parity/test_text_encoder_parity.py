"""The text encoder against transformers' Gemma-2 and Gemma-3, on small random models with padded prompts."""

import dataclasses
import functools
import json

import jax
import numpy as np
import parity_errors
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from sana_jax.models.text_encoder import TextEncoder
from sana_jax.weights import layout
from sana_jax.weights import text_encoder as weights
from sana_jax.weights.parts import abstract_params

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WINDOW, LENGTHS = 5, (17, 9, 1)  # tokens per prompt: longer than the window, shorter than the batch, only <bos>
SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    query_pre_attn_scalar=10,
    sliding_window=WINDOW,
    attn_implementation="eager",  # SDPA would drop the soft-cap
)
CONFIGS = {
    # The cap is low enough to bend the scores of a random model.
    "gemma2": lambda: transformers.Gemma2Config(num_hidden_layers=4, attn_logit_softcapping=2.0, **SIZES),
    # Seven layers: the pattern of five windows to one full layer, and one beyond.
    "gemma3": lambda: transformers.Gemma3TextConfig(num_hidden_layers=7, rope_theta=5000.0, **SIZES),
}
MODELS = {"gemma2": "Gemma2Model", "gemma3": "Gemma3TextModel"}


@torch.no_grad()
def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():  # the norms' weights are zero by initialisation
        parameter.normal_(std=0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model.eval()


@functools.cache
def oracle(kind):
    """transformers' config.json values, tensors, inputs and hidden states."""
    config = CONFIGS[kind]()
    model = randomised(getattr(transformers, MODELS[kind])(config))
    rng = np.random.default_rng(0)
    ids = rng.integers(5, SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    ids = np.where(mask, ids, 0)
    with torch.no_grad():
        hidden = model(torch.tensor(ids), attention_mask=torch.tensor(mask.astype(np.int64)))[0].numpy()
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    return json.loads(config.to_json_string()), tensors, ids.astype(np.int32), mask, hidden


@functools.cache
def converted(kind):
    """Our configuration and parameters, by the key table."""
    values, tensors, ids, mask, _ = oracle(kind)
    config = weights.config_from_json(values)
    shapes = jax.eval_shape(TextEncoder(config).init, jax.random.key(0), ids, mask)["params"]
    return config, layout.read(weights.entries(config), weights.canonical(tensors), shapes)


@functools.cache
def compiled(config):
    return jax.jit(TextEncoder(config).apply)


def ours(kind, change=lambda params: params, **overrides):
    *_, ids, mask, _ = oracle(kind)
    config, params = converted(kind)
    return np.asarray(compiled(dataclasses.replace(config, **overrides))({"params": change(params)}, ids, mask))


def relative_error(kind, hidden):
    """Largest difference at valid positions over the largest expected value."""
    *_, mask, expected = oracle(kind)
    return np.abs(hidden - expected)[mask].max() / np.abs(expected[mask]).max()


@pytest.mark.parametrize("kind", CONFIGS)
def test_hidden_states_are_those_of_transformers(kind, measured):
    measured(f"text encoder {kind}", "hidden states, tiny model", relative_error(kind, ours(kind)), 1e-4)


def test_the_window_of_gemma_2_2b_ends_where_that_of_transformers_does(measured):
    """4096 tokens, which SANA's prompts never reach."""
    sizes = SIZES | dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=4096)
    config = transformers.Gemma2Config(num_hidden_layers=1, **sizes)
    model = randomised(transformers.Gemma2Model(config))
    ids = np.random.default_rng(0).integers(5, SIZES["vocab_size"], (1, 4110))
    module = TextEncoder(weights.config_from_json(json.loads(config.to_json_string())))
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    params = layout.read(weights.entries(module.config), weights.canonical(tensors), abstract_params(module))

    hidden = jax.jit(module.apply)({"params": params}, ids.astype(np.int32), np.ones(ids.shape, np.int32))

    def error(window):
        model.config.sliding_window = window
        with torch.no_grad():
            expected = model(torch.tensor(ids))[0].numpy()
        return parity_errors.relative_error(hidden[:, -20:], expected[:, -20:])

    measured("text encoder gemma2", "hidden states beyond the window of 4096", error(4096), 1e-4)
    assert error(4090) > 1e-4


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("gemma2", {"attn_logit_softcap": None}),
        ("gemma2", {"sliding_window": WINDOW + 1}),
        ("gemma2", {"sliding_pattern": 3}),
        ("gemma2", {"rope_theta": 9000.0}),
        ("gemma2", {"query_pre_attn_scalar": 11}),
        ("gemma3", {"rope_local_theta": None}),
        ("gemma3", {"sliding_pattern": 7}),
        ("gemma3", {"attn_logit_softcap": 2.0}),
    ],
)
def test_changing_one_option_breaks_parity(kind, overrides):
    assert relative_error(kind, ours(kind, **overrides)) > 1e-3


@pytest.mark.parametrize(
    ("kind", "path"),
    [(kind, path) for kind in CONFIGS for path in ("layers/norm_mlp_out/scale", "layers/attention/k/kernel")]
    + [("gemma3", "layers/attention/norm_q/scale")],
)
def test_zeroing_one_parameter_breaks_parity(kind, path):
    def zero(params):
        flat = traverse_util.flatten_dict(params, sep="/")
        return traverse_util.unflatten_dict({**flat, path: np.zeros_like(flat[path])}, sep="/")

    assert relative_error(kind, ours(kind, zero)) > 1e-3


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_written_model_opens_in_transformers_with_the_same_hidden_states(kind, tmp_path):
    *_, ids, mask, hidden = oracle(kind)
    config, params = converted(kind)
    written = jax.tree.map(np.ascontiguousarray, layout.write(weights.entries(config), params))
    save_file(written, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(weights.config_to_json(config)))
    model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(model).__name__ == MODELS[kind]
    with torch.no_grad():
        again = model(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())[0].numpy()
    np.testing.assert_allclose(again[mask], hidden[mask], atol=1e-6)
