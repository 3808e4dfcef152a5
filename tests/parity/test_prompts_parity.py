"""Token ids and text features against diffusers' SanaPipeline and transformers' Gemma tokenizer."""

import inspect
import json

import jax
import numpy as np
import pytest
from parity_errors import relative_error

from sana_jax import prompts
from sana_jax import tokenizer as tokenizers_
from sana_jax.models.text_encoder import TextEncoder
from sana_jax.weights import layout
from sana_jax.weights import text_encoder as weights

pytestmark = pytest.mark.parity
diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = [
    "A red apple, Noto style ",
    "grinning cat",
    "",
    "  two  spaces, 12% & <bos> İstanbul ☃ <mask>\ttab",
    "一只红苹果 und ein 🐱 auf dem Tisch",  # the MultiLing releases
    "a very long prompt that is cut, a very long prompt that is cut",
]
MAX_LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    captions = ["a red apple, noto style", "a grinning cat on a table", "describe the prompt below: user prompt"] * 3
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizers_.save(tokenizers_.train_tokenizer(captions, 150), path)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    """A random Gemma-2 inside diffusers' pipeline, and the same weights as ours."""
    torch.manual_seed(0)
    model = transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=150,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    config = weights.config_from_json(json.loads(model.config.to_json_string()))
    module, ids = TextEncoder(config), np.zeros((1, 4), np.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    params = layout.read(weights.entries(config), weights.canonical(tensors), shapes)
    pipeline = diffusers.SanaPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        text_encoder=model,
        vae=None,
        transformer=None,
        scheduler=None,
    )
    return pipeline, jax.jit(module.apply), params


def test_the_instruction_is_the_default_of_diffusers():
    default = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert tuple(default) == prompts.COMPLEX_HUMAN_INSTRUCTION


INSTRUCTION = ["describe the Prompt below", "user prompt: "]


@pytest.mark.parametrize(
    "instruction,max_length", [(None, 12), ([], 12), *((INSTRUCTION, length) for length in (2, 77, 300))]
)
def test_text_features_and_masks_are_those_of_sana_pipeline(folder, encoder, instruction, max_length, measured):
    pipeline, encode, params = encoder
    with torch.no_grad():
        expected, expected_mask, null, null_mask = pipeline.encode_prompt(
            PROMPTS,
            negative_prompt="Blurry ",
            device="cpu",
            max_sequence_length=max_length,
            complex_human_instruction=instruction,
        )
    tokenizer = tokenizers_.load(folder)
    cases = [
        (PROMPTS, instruction, expected, expected_mask),
        (["Blurry "] * len(PROMPTS), None, null, null_mask),
    ]
    for texts, lines, features, features_mask in cases:
        ids, mask = prompts.tokenize_prompts(tokenizer, texts, lines, max_length)
        states = encode({"params": params}, ids, mask)
        hidden, kept = prompts.select_features(states, mask, max_length)
        np.testing.assert_array_equal(kept, features_mask.numpy())
        valid = kept.astype(bool)
        error = relative_error(np.asarray(hidden)[valid], features.numpy()[valid])
        measured("prompts", "text features of 2 to 300 tokens, masks equal", error, 1e-4)
        if lines:  # the last positions without the first
            last = np.asarray(states)[:, -max_length:]
            assert relative_error(last[valid], features.numpy()[valid]) > 1e-2


def test_skipping_the_lower_case_breaks_the_ids(folder):
    """We follow diffusers; the original code's ids come with lower_case=False."""
    ids, _ = prompts.tokenize_prompts(tokenizers_.load(folder), PROMPTS, None, MAX_LENGTH)
    changed, _ = prompts.tokenize_prompts(tokenizers_.load(folder), PROMPTS, None, MAX_LENGTH, lower_case=False)
    assert (ids != changed).any()


@pytest.mark.parametrize("opened_by", ["AutoTokenizer", "GemmaTokenizerFast"])
def test_transformers_gives_the_ids_of_a_trained_tokenizer(folder, opened_by):
    theirs = getattr(transformers, opened_by).from_pretrained(folder)
    ours = tokenizers_.load(folder)
    assert theirs(PROMPTS).input_ids == [encoding.ids for encoding in ours.encode_batch(PROMPTS)]
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id) == (0, 1, 2, 3)
    assert len(theirs) == ours.get_vocab_size()


def test_a_folder_saved_again_by_transformers_gives_the_same_ids(folder, tmp_path):
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    first, second = tokenizers_.load(folder), tokenizers_.load(tmp_path)
    for prompt in PROMPTS:
        assert second.encode(prompt).ids == first.encode(prompt).ids
