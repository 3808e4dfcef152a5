"""Tokens of captions: those of the instruction that all of them have, and those that are cut off."""

from collections.abc import Sequence

import numpy as np
from absl import logging
from jaxtyping import Int
from tokenizers import Tokenizer

from sana_jax import prompts


class CutWarning:
    """Says once that a caption is longer than what the text encoder reads of it."""

    def __init__(self, tokenizer: Tokenizer, instruction: Sequence[str] | None, max_length: int, lower_case: bool):
        self._tokenizer, self._settings, self._said = tokenizer, (instruction, max_length, lower_case), False

    def __call__(self, captions: Sequence[str], mask: Int[np.ndarray, "B L"]) -> None:
        full = [caption for caption, last in zip(captions, mask[:, -1], strict=True) if last]
        if self._said or not full:
            return
        _, max_length, _ = self._settings
        cut = prompts.left_out(self._tokenizer, full, *self._settings)
        if cut:
            self._said = True
            logging.warning(
                "captions are read up to %d tokens (text_encoder.max_length); the first longer one loses: %s",
                max_length,
                cut[0],
            )


def instruction_tokens(tokenizer: Tokenizer, instruction: Sequence[str], max_length: int) -> Int[np.ndarray, " P"]:
    """The tokens with which every instructed caption begins, whatever it is: a frozen encoder reads them once."""
    ids = prompts.tokenize_prompts(tokenizer, [""], instruction, max_length)[0]
    return ids[0, : prompts.constant_tokens(tokenizer, instruction, ids)]


def check_instruction(ids: Int[np.ndarray, "B L"], shared: Int[np.ndarray, " P"], captions: Sequence[str]) -> None:
    """Raises ValueError for a caption that changes the tokens of the instruction before it."""
    for row, caption in zip(ids, captions, strict=True):
        if not np.array_equal(row[: len(shared)], shared):
            raise ValueError(
                f"the tokenizer joins the caption {caption[:40]!r} with more than the last {prompts.BOUNDARY_TOKENS} "
                "tokens of the instruction before it, which is encoded once for all captions. Use another tokenizer, or "
                "text_encoder.use_instruction=False."
            )
