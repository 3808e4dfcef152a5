"""Training, saving and loading of Gemma-like tokenizers."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer

from sana_jax import tokenizer as tokenizers_

CAPTIONS = [
    "a red apple, noto style",
    "a green apple on a red background, twemoji style",
    "Grinning Face, fluent-3d style",
    "grinning cat with 12 smiles, noto style",
    "café au lait",
] * 3


@pytest.fixture(scope="module")
def trained():
    return tokenizers_.train_tokenizer(CAPTIONS, 130)


def test_special_tokens_have_gemmas_ids(trained):
    ids = [trained.token_to_id(token) for token in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")]
    assert ids == [0, 1, 2, 3, 4]


def test_the_vocabulary_is_filled_up_to_its_size_and_merged_from_the_captions(trained):
    assert trained.get_vocab_size() == 130
    assert trained.encode("x style").tokens == ["<bos>", "x", "▁style"]


def test_a_text_starts_with_bos_and_has_no_eos(trained):
    assert trained.encode("").ids == [2]
    ids = trained.encode("a red apple").ids
    assert ids[0] == 2 and 1 not in ids


def test_a_word_has_the_same_tokens_before_punctuation(trained):
    assert trained.encode("x style,").tokens[:-1] == trained.encode("x style").tokens


def test_digits_are_single_tokens(trained):
    assert trained.encode("12").tokens == ["<bos>", "1", "2"]


def test_decoding_gives_the_text_back(trained):
    text = "grinning apple, 12 café  ok?"
    assert trained.decode(trained.encode(text).ids) == text


def test_printable_ascii_never_seen_has_tokens_and_other_characters_are_unknown(trained):
    assert 3 not in trained.encode("zebra {quiz} #7 ~ j_k").ids
    assert trained.encode("☃☃").tokens == ["<bos>", "<unk>"]


def test_captions_are_lower_cased_before_training(trained):
    assert not [token for token in trained.get_vocab() if token != token.lower()]


def test_all_added_tokens_are_in_the_file_that_transformers_reads(tmp_path):
    tokenizer = tokenizers_.train_tokenizer(CAPTIONS, 130)
    tokenizer.add_tokens([AddedToken("<table>", normalized=False)])
    tokenizers_.save(tokenizer, tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {token["content"]: token["special"] for token in written.values()} == {
        **dict.fromkeys(tokenizers_.SPECIAL_TOKENS, True),
        "<table>": False,
    }
    assert written[str(tokenizer.token_to_id("<table>"))]["content"] == "<table>"


def test_captions_can_be_learnt_as_they_are_written():
    trained = tokenizers_.train_tokenizer(CAPTIONS, 160, lower_case=False)
    assert 3 not in trained.encode("ZEBRA Quiz").ids
    assert trained.decode(trained.encode("Grinning Face").ids) == "Grinning Face"


def test_training_twice_gives_the_same_tokenizer(trained):
    assert tokenizers_.train_tokenizer(CAPTIONS, 130).to_str() == trained.to_str()


def test_too_small_a_vocabulary_names_the_smallest_possible():
    with pytest.raises(ValueError, match=r"vocab_size=20 is smaller than .* Use at least \d+"):
        tokenizers_.train_tokenizer(CAPTIONS, 20)


@pytest.mark.parametrize("captions", [[], ["", "  "]])
def test_training_needs_a_caption(captions):
    with pytest.raises(ValueError, match="no caption"):
        tokenizers_.train_tokenizer(captions, 200)


@pytest.mark.parametrize("subfolder", ["", "tokenizer"])
def test_a_saved_tokenizer_loads_from_its_folder_and_from_the_pipelines(trained, tmp_path, subfolder):
    tokenizers_.save(trained, tmp_path / subfolder)
    assert sorted(file.name for file in (tmp_path / subfolder).iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert tokenizers_.load(tmp_path).to_str() == trained.to_str()


def test_loading_switches_stored_padding_and_truncation_off(trained, tmp_path):
    stored = Tokenizer.from_str(trained.to_str())
    stored.enable_padding(length=9)
    stored.enable_truncation(3)
    tokenizers_.save(stored, tmp_path)
    text = "a red apple, noto style"
    assert tokenizers_.load(tmp_path).encode(text).ids == trained.encode(text).ids


def test_a_file_without_the_rule_that_adds_bos_is_given_it(trained, tmp_path):
    values = json.loads(trained.to_str()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert tokenizers_.load(tmp_path).encode("a red").ids == trained.encode("a red").ids


def test_a_folder_with_only_a_sentencepiece_model_names_the_way_out(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\0")
    with pytest.raises(FileNotFoundError, match="tokenizer.model but no tokenizer.json.*save_pretrained"):
        tokenizers_.load(tmp_path)


def test_an_empty_folder_names_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        tokenizers_.load(tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable tokenizer file"):
        tokenizers_.load(tmp_path)


def test_a_tokenizer_of_another_family_is_refused(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained.to_str().replace("<bos>", "[CLS]"))
    with pytest.raises(ValueError, match="no <bos> token"):
        tokenizers_.load(tmp_path)
