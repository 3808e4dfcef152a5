"""From prompts to token ids, and from hidden states to the features that the transformer reads (SANA, section 2.3).

SANA puts a "complex human instruction" (CHI) before the prompt: the language model never answers it, it only shapes the
hidden states. The states of the instruction are dropped again: kept are the first token and the last
`max_sequence_length - 1` positions, a window that begins about where the user's prompt does.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped
from tokenizers import Encoding, Tokenizer

from sana_jax.models.text_encoder import TextEncoder, TextPrefix

MAX_SEQUENCE_LENGTH = 300  # of every public SANA model
# So many tokens at an instruction's end are not taken to be the same before every prompt: the tokenizer may join the last
# ones with the prompt's first letters ("User Prompt: " and "a" end in " a").
BOUNDARY_TOKENS = 4


# The published instruction line by line, as diffusers' SanaPipeline has it.
COMPLEX_HUMAN_INSTRUCTION = (
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image "
    "generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
    "relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
    "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
    "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
    "skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary "
    "or evaluations:",
    "User Prompt: ",
)
# As the original training code has it: double quotes. The public models were trained with these bytes.
COMPLEX_HUMAN_INSTRUCTION_ORIGINAL = (
    COMPLEX_HUMAN_INSTRUCTION[0].replace("'", '"'),
    *COMPLEX_HUMAN_INSTRUCTION[1:],
)
INSTRUCTIONS = {"diffusers": COMPLEX_HUMAN_INSTRUCTION, "original": COMPLEX_HUMAN_INSTRUCTION_ORIGINAL}


def instruction_lines(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Lines of an instruction: itself, or by name the published one as diffusers or the original code quotes it.

    Raises:
      ValueError: a string that is neither name.
    """
    if isinstance(value, str):
        if value not in INSTRUCTIONS:
            raise ValueError(
                f"complex_human_instruction={value[:40]!r} is not one of {', '.join(INSTRUCTIONS)}; give an "
                "instruction of your own as a list of its lines."
            )
        return INSTRUCTIONS[value]
    return tuple(value) if value else None


def prepare_prompt(prompt: str, lower_case: bool = True) -> str:
    """Strips and lower-cases, as diffusers' SanaPipeline does; the original code only strips."""
    return prompt.lower().strip() if lower_case else prompt.strip()


def tokenize_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    complex_human_instruction: Sequence[str] | None = None,
    max_sequence_length: int = MAX_SEQUENCE_LENGTH,
    lower_case: bool = True,
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
    """Token ids and mask, int32, padded on the right and cut to one length: the ids of diffusers' SanaPipeline.

    Without an instruction L is `max_sequence_length`; so are negative and null prompts ("") encoded, whatever the
    positive ones have before them. With one, L = tokens(instruction) + max_sequence_length - 2, and
    `select_features` reduces the encoder's states to `max_sequence_length` again.

    Args:
      tokenizer: as `sana_jax.tokenizer.load` gives it; it sets the begin-of-text token itself.
      prompts: the user's texts; stripped here.
      complex_human_instruction: lines put before every prompt, joined by newlines; None or empty for no instruction.
      max_sequence_length: text features per prompt that the transformer is given.
      lower_case: whether prompts are lower-cased, as diffusers does and the original code does not.

    Raises:
      ValueError: for a bare string, and for max_sequence_length < 2.
    """
    for name, value in (("prompts", prompts), ("complex_human_instruction", complex_human_instruction)):
        if isinstance(value, str):
            raise ValueError(f"{name} is one string ({value[:40]!r}); it is a sequence of strings. Use [{name}].")
    if max_sequence_length < 2:
        raise ValueError(
            f"max_sequence_length={max_sequence_length} leaves no room for the prompt beside the begin-of-text token; "
            f"use at least 2 (public models: {MAX_SEQUENCE_LENGTH})."
        )
    encodings, length = _encode(tokenizer, prompts, complex_human_instruction, max_sequence_length, lower_case)
    ids = np.full((len(encodings), length), tokenizer.token_to_id("<pad>"), np.int32)
    mask = np.zeros((len(encodings), length), np.int32)
    for row, encoding in enumerate(encodings):
        kept = encoding.ids[:length]
        ids[row, : len(kept)] = kept
        mask[row, : len(kept)] = 1
    return ids, mask


def left_out(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    complex_human_instruction: Sequence[str] | None = None,
    max_sequence_length: int = MAX_SEQUENCE_LENGTH,
    lower_case: bool = True,
) -> list[str]:
    """The ends of prompts that `tokenize_prompts` cuts off with the same arguments; none of prompts that fit."""
    encodings, length = _encode(tokenizer, prompts, complex_human_instruction, max_sequence_length, lower_case)
    return [tokenizer.decode(encoding.ids[length:]).strip() for encoding in encodings if len(encoding.ids) > length]


def _encode(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    complex_human_instruction: Sequence[str] | None,
    max_sequence_length: int,
    lower_case: bool,
) -> tuple[list[Encoding], int]:
    """Whole texts as tokens, and how many of these are kept."""
    instruction, length = "\n".join(complex_human_instruction or ()), max_sequence_length
    if instruction:
        # The instruction's count includes the begin-of-text token, and so does max_sequence_length; the other one less
        # is the public code's convention.
        length += len(tokenizer.encode(instruction).ids) - 2
    return tokenizer.encode_batch([instruction + prepare_prompt(prompt, lower_case) for prompt in prompts]), length


def constant_tokens(tokenizer: Tokenizer, complex_human_instruction: Sequence[str], ids: Int[np.ndarray, "B L"]) -> int:
    """How many first tokens of `ids` are the instruction's own in every row: all but BOUNDARY_TOKENS, or 0.

    One number for all prompts, so that what is computed of the rest has one shape. 0 where the instruction is shorter
    than that, or where a tokenizer lets a prompt reach further back into it.
    """
    own = np.asarray(tokenizer.encode("\n".join(complex_human_instruction)).ids, np.int32)
    count = max(len(own) - BOUNDARY_TOKENS, 0)
    return count if (ids[:, :count] == own[:count]).all() else 0


def read_features(
    encoder: TextEncoder,
    params: dict,
    ids: Int[Array | np.ndarray, "B L"],
    mask: Shaped[Array | np.ndarray, "B L"],
    prefix: TextPrefix | None,
    max_sequence_length: int,
) -> tuple[Float[Array, "B N D"], Shaped[Array | np.ndarray, "B N"]]:
    """What the transformer reads of tokenized prompts, and which of it is no padding; N = max_sequence_length.

    `prefix`: of the first tokens of every prompt, which `ids` and `mask` are without (`TextEncoder.encode_prefix`).
    """
    hidden = encoder.apply({"params": params}, ids, mask, prefix)
    if prefix is not None:
        first = jnp.broadcast_to(prefix.hidden, (hidden.shape[0], *prefix.hidden.shape[1:]))
        hidden = jnp.concatenate([first, hidden], axis=1)
        mask = jnp.pad(mask, ((0, 0), (first.shape[1], 0)), constant_values=1)
    return select_features(hidden, mask, max_sequence_length)


def select_features(
    hidden: Float[Array, "B L D"],
    mask: Shaped[Array | np.ndarray, "B L"],
    max_sequence_length: int = MAX_SEQUENCE_LENGTH,
) -> tuple[Float[Array, "B N D"], Shaped[Array | np.ndarray, "B N"]]:
    """Keeps position 0 and the last N - 1 positions, N = max_sequence_length; the identity where L = N.

    Raises:
      ValueError: where there are fewer than N positions.
    """
    length = hidden.shape[1]
    if length < max_sequence_length:
        raise ValueError(
            f"max_sequence_length={max_sequence_length} exceeds the {length} encoded positions; tokenize and select "
            "with the same max_sequence_length."
        )
    positions = np.r_[0, length - max_sequence_length + 1 : length]
    return hidden[:, positions], mask[:, positions]
