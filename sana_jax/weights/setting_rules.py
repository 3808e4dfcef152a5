"""Which values the settings in a pipeline folder's JSON files may have: kind and range.

Imports neither JAX nor NumPy, as `model_index`, which reads some of them before anything else is there.
"""

import dataclasses
import json
import math
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value has to be.

    Attributes:
      text: in words, as "a whole number of at least 1".
      example: a value that is so.
      holds: whether a value, as `json.loads` gives it, is so.
    """

    text: str
    example: str
    holds: Callable[[Any], bool]


def check(file: pathlib.Path, values: Mapping, rules: Mapping[str, Rule]) -> None:
    """Raises ValueError, with file, key, value and rule, where one of the `values` is not what its rule says."""
    for key, rule in rules.items():
        if key in values and not rule.holds(values[key]):
            shown = repr(values[key])
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            raise ValueError(f"{file}: {key} is {shown}; give it {rule.text}, as {rule.example}.")


def whole_number(least: int, example: int) -> Rule:
    """An integer of at least `least`."""
    return Rule(f"a whole number of at least {least}", str(example), lambda value: _is_whole(value) and value >= least)


def number(example: float, *, positive: bool = False) -> Rule:
    """A finite number of at least 0, or above it."""

    def holds(value) -> bool:
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        return known and math.isfinite(value) and (value > 0 if positive else value >= 0)

    return Rule("a number above 0" if positive else "a number of at least 0", str(example), holds)


def one_of(*choices) -> Rule:
    """One of these, which are strings or integers."""
    shown = [f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices]
    kinds = {type(choice) for choice in choices}
    return Rule(f"one of {', '.join(shown)}", shown[0], lambda value: type(value) in kinds and value in choices)


def list_of(rule: Rule, least: int = 0) -> Rule:
    """A list whose items each follow `rule`, `least` of them or more."""
    count = f" of at least {least}" if least else ""
    return Rule(
        f"a list{count}, each item {rule.text}",
        f"[{rule.example}]",
        lambda value: isinstance(value, (list, tuple)) and len(value) >= least and all(map(rule.holds, value)),
    )


def either(*rules: Rule) -> Rule:
    """What follows any of the rules."""
    return Rule(
        ", or ".join(rule.text for rule in rules),
        rules[0].example,
        lambda value: any(rule.holds(value) for rule in rules),
    )


def of_fields(config_class: type, keys: Mapping[str, str]) -> dict[str, Rule]:
    """Rules for the keys of a file that stand for fields of a dataclass (key -> field), by the fields' kinds."""
    kinds, fields = (
        typing.get_type_hints(config_class),
        {field.name: field for field in dataclasses.fields(config_class)},
    )
    return {key: _of_kind(kinds[name])._replace(example=json.dumps(fields[name].default)) for key, name in keys.items()}


def _of_kind(kind) -> Rule:
    args = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        items = whole_number(0, 1) if args[0] is int else _of_kind(args[0])
        return list_of(items)
    if args:
        return either(*map(_of_kind, args))
    return {int: whole_number(1, 1), float: number(1.0, positive=True), bool: FLAG, str: TEXT, type(None): NULL}[kind]


FLAG = Rule("true or false", "true", lambda value: isinstance(value, bool))
TEXT = Rule("a text", '"User Prompt: "', lambda value: isinstance(value, str))
NULL = Rule("null", "null", lambda value: value is None)
SIDE = either(whole_number(1, 1024), NULL)  # of a picture, in pixels; null: what the transformer was trained at


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
