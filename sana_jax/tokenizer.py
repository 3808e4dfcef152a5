"""Gemma tokenizers through the `tokenizers` package: load one from a model folder, train a small one, save it.

Gemma's scheme: spaces become "▁", then byte-pair encoding over the whole text, no prefix space, <bos> in front.
A saved folder opens with transformers' AutoTokenizer as a GemmaTokenizer and gives the same ids.
"""

import json
import pathlib
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sana_jax.prompts import prepare_prompt
from sana_jax.weights.model_index import check_fetched

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # ids 0 to 4, as in Gemma
_SPACE = "▁"


def load(path: str | pathlib.Path) -> Tokenizer:
    """Reads `tokenizer.json` from a tokenizer folder or from a pipeline folder that has `tokenizer/`.

    Padding and truncation stored in the file are switched off: `sana_jax.prompts.tokenize_prompts` does both. A file
    without the rule that puts <bos> in front is given it.

    Raises:
      FileNotFoundError: there is no tokenizer.json; says what to do where only a SentencePiece tokenizer.model is.
      ValueError: the file is damaged, or has no <pad> or no <bos> token.
    """
    folder = pathlib.Path(path)
    if (folder / "tokenizer").is_dir():
        folder = folder / "tokenizer"
    file = folder / "tokenizer.json"
    if not file.is_file():
        if (folder / "tokenizer.model").is_file():
            raise FileNotFoundError(
                f"{folder} has a SentencePiece tokenizer.model but no tokenizer.json, the form that is read here. "
                f'Make one with transformers: AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}").'
            )
        raise FileNotFoundError(f"{file} does not exist; the folder of a tokenizer holds a tokenizer.json.")
    check_fetched(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{file} is not a readable tokenizer file: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for token in ("<pad>", "<bos>"):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{file} has no {token} token; the text encoders here take a Gemma tokenizer.")
    if tokenizer.encode("").ids[:1] != [tokenizer.token_to_id("<bos>")]:
        _add_bos(tokenizer)
    return tokenizer


def train_tokenizer(captions: Iterable[str], vocab_size: int, lower_case: bool = True) -> Tokenizer:
    """Learns a byte-pair vocabulary of at most `vocab_size` tokens, the five special ones included.

    Captions are prepared as prompts are, by default in lower case. Merges stay within one word with the space before it;
    digits and punctuation are tokens of their own, so that "red," shares the token of "red". Every printable ASCII
    character (of letters those that prompts can have) has a token whether or not it occurs; a character without one
    becomes <unk>.

    Raises:
      ValueError: no caption, or a vocabulary without room for the single characters.
    """
    texts = [prepare_prompt(caption, lower_case) for caption in captions]
    if not any(texts):
        raise ValueError("no caption to train a tokenizer on; give at least one non-empty text.")
    alphabet = {prepare_prompt(chr(code), lower_case) for code in range(0x21, 0x7F)} | {_SPACE}
    alphabet |= {character for text in texts for character in text.replace(" ", _SPACE)}
    if vocab_size < len(SPECIAL_TOKENS) + len(alphabet):
        raise ValueError(
            f"vocab_size={vocab_size} is smaller than the {len(alphabet)} single characters and {len(SPECIAL_TOKENS)} "
            f"special tokens. Use at least {len(SPECIAL_TOKENS) + len(alphabet)}."
        )
    learner = _gemma_tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_SPACE, "merged_with_next"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(alphabet),
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    # No merge crosses a word, so the plain Gemma scheme, which does not split into words, gives the same tokens.
    tokenizer = _gemma_tokenizer(
        models.BPE(
            vocab=learned["vocab"],
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    _add_bos(tokenizer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: str | pathlib.Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, for `load` and for transformers."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = {f"{token[1:-1]}_token": token for token in SPECIAL_TOKENS}
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "added_tokens_decoder": {
            str(number): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        **special,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def _gemma_tokenizer(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    return tokenizer


def _add_bos(tokenizer: Tokenizer) -> None:
    bos = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
