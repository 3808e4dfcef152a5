"""The instruction's bytes, token ids and the selection of features."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import prompts
from sana_jax.tokenizer import train_tokenizer

CHI = ("describe:", "prompt: ")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red apple on a table", "describe: prompt: something"] * 3, 120)


def test_the_instruction_has_the_published_bytes():
    digest = hashlib.sha256("\n".join(prompts.COMPLEX_HUMAN_INSTRUCTION).encode()).hexdigest()
    assert len(prompts.COMPLEX_HUMAN_INSTRUCTION) == 8
    assert digest == "48290080bb4fd4a264bdc81d0647ac0221359a36506e2b3e954616d6cb48c3da"


def test_the_two_quotings_differ_in_two_characters():
    single, double = ("\n".join(lines) for lines in (
        prompts.COMPLEX_HUMAN_INSTRUCTION,
        prompts.COMPLEX_HUMAN_INSTRUCTION_ORIGINAL,
    ))  # fmt: skip
    differing = [(a, b) for a, b in zip(single, double, strict=True) if a != b]
    assert differing == [("'", '"')] * 2
    assert 'generate an "Enhanced prompt" that' in double


def test_prompts_are_lower_cased_and_stripped():
    assert prompts.prepare_prompt("  A Red\tAPPLE \n") == "a red\tapple"


def test_a_prompt_is_padded_on_the_right_to_the_sequence_length(tokenizer):
    ids, mask = prompts.tokenize_prompts(tokenizer, ["A red apple ", ""], None, 9)
    tokens = tokenizer.encode("a red apple").ids
    assert ids.tolist() == [tokens + [0] * (9 - len(tokens)), [2] + [0] * 8]
    assert mask.tolist() == [[1] * len(tokens) + [0] * (9 - len(tokens)), [1] + [0] * 8]
    assert ids.dtype == mask.dtype == np.int32


def test_a_long_prompt_is_cut_at_the_end(tokenizer):
    text = "a red apple on a table"
    ids, mask = prompts.tokenize_prompts(tokenizer, [text], None, 4)
    assert ids.tolist() == [tokenizer.encode(text).ids[:4]]
    assert mask.all()


@pytest.mark.parametrize("instruction", [None, CHI])
def test_what_is_cut_off_is_known(tokenizer, instruction):
    text = "A red apple on a table"
    for length in range(4, 20):
        ids, _ = prompts.tokenize_prompts(tokenizer, [text], instruction, length)
        kept = "".join(tokenizer.decode(ids[0]).split()).removeprefix("describe:prompt:")
        (end,) = prompts.left_out(tokenizer, [text, ""], instruction, length) or [""]
        assert kept + "".join(end.split()) == "aredappleonatable"
        assert bool(end) == (length < 7), "the text has 7 tokens, the begin-of-text token included"


def test_the_instruction_lengthens_the_sequence_by_its_tokens_less_two(tokenizer):
    ids, mask = prompts.tokenize_prompts(tokenizer, ["a red apple"], CHI, 9)
    instruction = tokenizer.encode("describe:\nprompt: ").ids
    assert ids.shape == mask.shape == (1, len(instruction) + 9 - 2)
    whole = tokenizer.encode("describe:\nprompt: a red apple").ids
    assert ids[0, : len(whole)].tolist() == whole
    assert mask.sum() == len(whole)


def test_an_empty_instruction_is_none(tokenizer):
    plain = prompts.tokenize_prompts(tokenizer, ["a red apple"], None, 9)
    np.testing.assert_array_equal(prompts.tokenize_prompts(tokenizer, ["a red apple"], [], 9), plain)


def test_lower_casing_is_a_setting(tokenizer):
    as_written, _ = prompts.tokenize_prompts(tokenizer, [" A Red Apple"], None, 20, lower_case=False)
    lowered, _ = prompts.tokenize_prompts(tokenizer, [" A Red Apple"], None, 20)
    assert as_written[0, : len(tokenizer.encode("A Red Apple").ids)].tolist() == tokenizer.encode("A Red Apple").ids
    np.testing.assert_array_equal(lowered, prompts.tokenize_prompts(tokenizer, ["a red apple"], None, 20)[0])
    assert (as_written != lowered).any()


def test_the_two_published_instructions_differ_in_one_pair_of_quotes():
    ours, original = prompts.instruction_lines("diffusers"), prompts.instruction_lines("original")
    assert "generate an 'Enhanced prompt' that" in ours[0] and 'generate an "Enhanced prompt" that' in original[0]
    assert ours[1:] == original[1:] and ours[0] == original[0].replace('"', "'")
    assert prompts.instruction_lines(["a", "b"]) == ("a", "b")
    assert prompts.instruction_lines(None) is None and prompts.instruction_lines([]) is None


def test_an_unknown_instruction_is_refused():
    with pytest.raises(ValueError, match="complex_human_instruction='native' is not one of diffusers, original"):
        prompts.instruction_lines("native")


def test_constant_tokens_are_the_same_before_every_prompt(tokenizer):
    lines = ["describe what you see:", "prompt: "]
    texts = ["a red apple", "", ": :", "x" * 50]
    ids, _ = prompts.tokenize_prompts(tokenizer, texts, lines, 9)
    own = tokenizer.encode("\n".join(lines)).ids
    count = prompts.constant_tokens(tokenizer, lines, ids)
    assert count == len(own) - prompts.BOUNDARY_TOKENS > 5
    assert (ids[:, :count] == own[:count]).all()
    ids[1, count - 1] += 1  # a tokenizer that lets the prompt reach back into the instruction
    assert prompts.constant_tokens(tokenizer, lines, ids) == 0
    assert prompts.constant_tokens(tokenizer, ["a"], ids) == 0


def test_the_first_position_and_the_last_ones_are_selected():
    hidden = jnp.arange(2 * 7 * 3.0).reshape(2, 7, 3)
    mask = np.arange(14).reshape(2, 7)
    kept, kept_mask = prompts.select_features(hidden, mask, 4)
    index = [0] + list(range(-4 + 1, 0))
    np.testing.assert_array_equal(kept, hidden[:, index])
    np.testing.assert_array_equal(kept_mask, mask[:, index])


def test_selection_is_the_identity_without_an_instruction():
    hidden = jnp.arange(2 * 5 * 3.0).reshape(2, 5, 3)
    kept, _ = prompts.select_features(hidden, np.ones((2, 5)), 5)
    np.testing.assert_array_equal(kept, hidden)


def test_selecting_more_than_was_encoded_is_refused():
    with pytest.raises(ValueError, match="max_sequence_length=6 exceeds the 5 encoded positions"):
        prompts.select_features(jnp.zeros((1, 5, 3)), np.ones((1, 5)), 6)


def test_a_bare_string_is_refused(tokenizer):
    with pytest.raises(ValueError, match="prompts is one string"):
        prompts.tokenize_prompts(tokenizer, "a red apple")


def test_a_sequence_length_without_room_is_refused(tokenizer):
    with pytest.raises(ValueError, match="max_sequence_length=1 leaves no room"):
        prompts.tokenize_prompts(tokenizer, ["a"], None, 1)
