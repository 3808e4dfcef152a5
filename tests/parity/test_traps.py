"""Where public implementations disagree or invite a mistake (T1 to T12 of the reference): which reading is followed.

T1 clip of the fp16 releases       here; who gets it: tests/unit/test_fp16_releases.py
T2 channel groups of LiteMLA       test_autoencoder_parity: reading q, k and v as thirds per head breaks parity
T3 integer timesteps               here
T4 mask of the null branch         here; in training: tests/unit/test_class_dropout.py
T5 quotes, lower case              test_prompts_parity
T6 epsilons                        here; files of the original code: test_native_parity
T7 Gemma's soft-cap                test_text_encoder_parity: changing one option breaks parity
T8 position table                  test_transformer_parity, every variant; tests/unit/test_transformer.py
T9 flow shift                      tests/unit/test_folder.py: read from the scheduler's file; test_solvers_parity
T10 final layer, caption norm      test_transformer_parity: changing one tensor breaks parity; here
T11 batch norm's statistics        test_autoencoder_parity: leaving them out breaks parity
T12 bias or packed tokens          here; rows without any text: test_transformer_parity
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import test_pipeline_parity as pipelines
import test_transformer_parity as transformers
from parity_errors import relative_error

from sana_jax.models.attention import SelfAttention, softmax_attention
from sana_jax.models.norms import rms_normalise

pytestmark = pytest.mark.parity
theirs, ours, noise = pipelines.theirs, pipelines.ours, pipelines.noise
divisible_by_4 = pipelines.divisible_by_4


@pytest.fixture(scope="module")
def sana():
    """(diffusers' model, its tensors, inputs, its velocity) of the tiny SANA."""
    model, tensors = transformers.make_pair(transformers.TINY)
    inputs = transformers.make_inputs(transformers.TINY)
    return model, tensors, inputs, transformers.run_theirs(model, transformers.TINY, inputs)


def test_t1_the_clip_is_that_of_the_self_attentions_output_to_the_range_of_float16():
    def attend(clamp, x, params=None):
        module = SelfAttention("linear", 8, qk_norm=False, eps=1e-15, clamp=clamp, dtype=jnp.dtype("float32"))
        params = module.init(jax.random.key(0), x)["params"] if params is None else params
        return module.apply({"params": params}, x)

    x = 1e5 * jax.random.normal(jax.random.key(1), (1, 6, 16))
    plain, clipped = attend(False, x), attend(True, x)
    np.testing.assert_array_equal(clipped, np.clip(plain, -65504, 65504))
    assert np.abs(plain).max() > 65504


def test_t3_timesteps_are_truncated_as_in_the_stock_models_unless_they_are_continuous(sana):
    """diffusers' pipeline hands int64 timesteps on; its transformer takes what it is given."""
    model, tensors, inputs, _ = sana
    fractional = inputs | {"timesteps": jnp.asarray([3.7, 420.5, 998.9])}
    truncated = transformers.run_ours(transformers.TINY, tensors, fractional)
    whole = transformers.run_theirs(model, transformers.TINY, inputs | {"timesteps": jnp.asarray([3.0, 420.0, 998.0])})
    assert relative_error(truncated, whole) < 5e-5
    config = dataclasses.replace(transformers.TINY, integer_timesteps=False)
    continuous = transformers.run_ours(config, tensors, fractional)
    assert relative_error(continuous, transformers.run_theirs(model, config, fractional)) < 5e-5
    assert relative_error(truncated, continuous) > 1e-4


@pytest.mark.parametrize("null_mask", ["own", "prompt"])
def test_t4_the_null_branch_sees_its_own_tokens_as_in_diffusers_or_as_many_as_the_prompt(
    theirs, ours, noise, null_mask, measured
):
    """The original code's reading in diffusers: the negative prompt's features with the prompt's mask."""
    pipe = theirs[0]
    encoded = pipe.encode_prompt(
        pipelines.PROMPTS,
        negative_prompt="blurry",
        max_sequence_length=pipelines.LENGTH,
        complex_human_instruction=pipelines.INSTRUCTION,
    )
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    arguments = dict(zip(names, encoded, strict=True))
    if null_mask == "prompt":
        arguments["negative_prompt_attention_mask"] = arguments["prompt_attention_mask"]
    expected = pipelines.run_theirs(pipe, noise, "latent", None, **arguments | {"negative_prompt": None})
    before = ours.defaults
    try:
        ours.defaults = dataclasses.replace(before, null_mask=null_mask)
        latents = pipelines.run_ours(ours, noise, "latent")
        ours.defaults = dataclasses.replace(before, null_mask="own" if null_mask == "prompt" else "prompt")
        other = pipelines.run_ours(ours, noise, "latent")
    finally:
        ours.defaults = before
    measured("SANA pipeline", f"final latents, null_mask={null_mask!r}", pipelines.relative(latents, expected), 1e-3)
    assert pipelines.relative(other, expected) > 1e-3


def test_t6_the_linear_attentions_epsilon_is_that_of_diffusers_and_has_a_switch(sana):
    """Activations so small that 1e-8 of the original code is as large as the sums."""
    _, tensors, inputs, _ = sana
    small = {
        name: 1e-5 * value if ".attn1.to_q" in name or ".attn1.to_k" in name else value
        for name, value in tensors.items()
    }
    model, _ = transformers.make_pair(transformers.TINY)
    model.load_state_dict({name: torch.tensor(value) for name, value in small.items()})
    expected = transformers.run_theirs(model, transformers.TINY, inputs)
    assert relative_error(transformers.run_ours(transformers.TINY, small, inputs), expected) < 5e-5
    original = dataclasses.replace(transformers.TINY, attention_eps=1e-8)
    assert relative_error(transformers.run_ours(original, small, inputs), expected) > 1e-2


def test_t6_the_cross_attentions_norm_has_the_epsilon_of_diffusers_and_a_switch():
    config = dataclasses.replace(transformers.TINY, qk_norm=True)
    model, tensors = transformers.make_pair(config)
    tensors = {name: 1e-3 * value if ".attn2.to_k" in name else value for name, value in tensors.items()}
    model.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    inputs = transformers.make_inputs(config)
    expected = transformers.run_theirs(model, config, inputs)
    assert relative_error(transformers.run_ours(config, tensors, inputs), expected) < 5e-5
    original = dataclasses.replace(config, cross_norm_eps=1e-6)
    assert relative_error(transformers.run_ours(original, tensors, inputs), expected) > 1e-4


@pytest.mark.parametrize("rows", [[1, 0, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2], [0, 1, 5, 3, 4, 2]])
def test_t10_another_order_of_shift_scale_and_gate_breaks_parity(sana, rows):
    _, tensors, inputs, expected = sana
    tables = {
        name: value[rows] for name, value in tensors.items() if name.endswith("scale_shift_table") and len(value) == 6
    }
    assert tables
    assert relative_error(transformers.run_ours(transformers.TINY, {**tensors, **tables}, inputs), expected) > 1e-2


def test_t12_the_bias_on_padding_gives_what_packed_tokens_give():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 16)) for i in range(3))
    lengths = (5, 2)
    mask = jnp.arange(5) < jnp.asarray(lengths)[:, None]
    biased = softmax_attention(q, k, v, heads=2, mask=mask)
    for row, length in enumerate(lengths):
        packed = softmax_attention(q[row : row + 1], k[row : row + 1, :length], v[row : row + 1, :length], heads=2)
        np.testing.assert_allclose(biased[row], packed[0], rtol=1e-5, atol=1e-6)


def test_the_norm_of_the_caption_and_of_q_and_k_is_the_root_mean_square():
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    norm = diffusers.models.normalization.RMSNorm(8, eps=1e-5, elementwise_affine=False)
    np.testing.assert_allclose(rms_normalise(jnp.asarray(x), 1e-5), norm(torch.tensor(x)).numpy(), rtol=1e-5)
