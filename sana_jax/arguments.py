"""Kinds of a call's arguments: each of these returns the value as Python has it, or names what was given in its place.

Imports neither JAX nor NumPy. Their scalars are numbers here.
"""

import operator
import pathlib
from collections.abc import Callable, Iterable
from typing import Any


def whole_number(name: str, value: Any) -> int:
    """An integer.

    Raises:
      ValueError: it is none.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name}={shown(value)} is not a whole number; give one.")


def number(name: str, value: Any) -> float:
    """A number.

    Raises:
      ValueError: it is none.
    """
    try:
        if not isinstance(value, (bool, str, bytes)):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name}={shown(value)} is not a number; give one.")


def optional(kind: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """None, or what `kind` (`whole_number` or `number`) takes."""
    return None if value is None else kind(name, value)


def pair(name: str, value: Any, kind: Callable[[str, Any], Any], example: tuple) -> tuple:
    """Two values that `kind` (`whole_number` or `number`) takes.

    Raises:
      ValueError: they are not two, or one is of another kind.
    """
    values = _items(value)
    if values is None or len(values) != 2:
        raise ValueError(f"{name}={shown(value)} is not a pair; give two numbers, as {example}.")
    return tuple(kind(f"{name}[{place}]", one) for place, one in enumerate(values))


def whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    """Integers.

    Raises:
      ValueError: no sequence, or one of other values.
    """
    return _each(whole_number, name, value, "whole numbers", "(0,)")


def numbers(name: str, value: Any) -> tuple[float, ...]:
    """Numbers. Raises as `whole_numbers`."""
    return _each(number, name, value, "numbers", "(1.5, 0.0)")


def _each(kind: Callable[[str, Any], Any], name: str, value: Any, several: str, example: str) -> tuple:
    values = _items(value)
    if values is None:
        raise ValueError(f"{name}={shown(value)} is not a sequence of {several}; give one, as {example}.")
    return tuple(kind(f"{name}[{place}]", one) for place, one in enumerate(values))


def texts(name: str, value: Any) -> list[str]:
    """One text or several, as a list.

    Raises:
      ValueError: neither, or one has half a character: a surrogate code point, which no Unicode text has.
    """
    values = [value] if isinstance(value, str) else _items(value)
    if values is None or not all(isinstance(one, str) for one in values):
        raise ValueError(f"{name}={shown(value)} is not a text, nor a list of texts; give one of them.")
    for place, one in enumerate(values):
        try:
            one.encode()
        except UnicodeEncodeError as error:
            which = name if isinstance(value, str) else f"{name}[{place}]"
            raise ValueError(
                f"{which}={shown(one)} is not Unicode text: its character {error.start} is the surrogate "
                f"{one[error.start]!r} alone; give UTF-8, and both halves of a \\u pair."
            ) from None
    return values


def prompt_lines(name: str, file: str) -> list[str]:
    """The prompts in a text file: its non-blank lines, without the spaces around them.

    Raises:
      ValueError: it cannot be read, is not UTF-8, or has none.
    """
    try:  # whatever can be read: a pipe, as the shell's <(...), is no file
        content = pathlib.Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name}={file} is not UTF-8 text.") from None
    except OSError as error:
        raise ValueError(
            f"{name}={file} cannot be read ({error.strerror}); give a text file with one prompt per line."
        ) from None
    lines = content.split("\n")  # splitlines() would cut at U+2028 and form feeds too
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{name}={file} has no prompt in it: one per line.")
    return prompts


def _items(value: Any) -> list | None:
    """None for what is no sequence of values."""
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        return None
    try:
        return list(value)
    except TypeError:  # an array of no dimensions
        return None


def shown(value: Any) -> str:
    """As it stands in an error or a log; of a long one, which may be somebody's whole file, the beginning."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
