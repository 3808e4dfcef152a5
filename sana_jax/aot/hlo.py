"""Reads the text of an optimised XLA program: its computations, and how often each instruction runs.

Only what the collectives' account needs is understood: names, types, opcodes, operands, attributes, and the calls between
computations. A loop's body stands in the text once and runs as often as the loop turns.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}
_ARRAY = re.compile(r"\b(pred|bf16|token|opaque|[suf]\d+|f8\w+|f4\w+|c64|c128)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_ON_CHIP = re.compile(r"S\([1-4]\)")  # 5 is the host's memory, 0 the HBM
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_RESULT = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%?([A-Za-z_][\w.\-]*)$")


class Trips(ValueError):
    """The number of turns of a loop cannot be told from the text."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the "%".
      type: of the result, as written.
      opcode: "all-gather", "fusion", ...
      operands: names; of a constant and a parameter, what stands in the brackets.
      attributes: the rest of the line.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def computation(self, key: str) -> str | None:
        """The computation that an attribute such as `body` or `calls` names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def computations(self, key: str) -> list[str]:
        """The same for an attribute that names several, as `branch_computations={%a, %b}`."""
        found = re.search(rf"\b{key}=\{{([^}}]*)\}}", self.attributes)
        return [name.strip().lstrip("%") for name in found[1].split(",")] if found else []


class Computation(dict):
    """Instructions by name, in the text's order.

    Attributes:
      root: the instruction whose result is the computation's.
    """

    root: Instruction


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed module.

    Attributes:
      computations: by name.
      entry: name of the one that runs first.
      partitions: devices that run the program together; of one slice, where there are several.
    """

    computations: dict[str, Computation]
    entry: str
    partitions: int


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction and how often a device executes it.

    Attributes:
      within: the computation in which it stands.
      times: executions in one run of the program.
      scope: name of the loop body (or the entry) that it belongs to, through fusions.
      fused: whether it stands in a fusion.
    """

    instruction: Instruction
    within: Computation
    times: int
    scope: str
    fused: bool


def arrays(type_text: str) -> list[tuple[int, bool]]:
    """Size of each array in a type, and whether it is kept on the chip: "(f32[2,3]{1,0}, u32[4]{0:S(1)})" is 24 False, 16 True."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(type_text):
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0]) if dtype not in ("token", "opaque") else 0
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim.removeprefix("<="))
        found.append((count * bits // 8, bool(_ON_CHIP.search(layout))))
    return found


def array_bytes(type_text: str) -> list[int]:
    """Sizes of the arrays in a type, in its order: "(f32[2,3]{1,0}, u32[])" gives [24, 4]."""
    return [size for size, _ in arrays(type_text)]


def parse(text: str) -> Program:
    """The program in the text of `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
        elif current is not None and line.startswith("}"):
            current = None
        elif current is not None:
            result = _RESULT.match(line)
            if result:
                instruction = _instruction(result[2], line[result.end() :])
                current[instruction.name] = instruction
                if result[1]:
                    current.root = instruction
    if entry is None:
        raise ValueError("the text holds no ENTRY computation; is it compiled.as_text()?")
    partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.index("\n")])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def executed(program: Program) -> Iterator[Run]:
    """Every instruction that runs, with its number of executions. All branches of a conditional are taken to run.

    Raises:
      Trips: a loop's number of turns is not in the text.
    """
    yield from _walk(program, program.entry, 1, program.entry, False)


def _walk(program: Program, name: str, times: int, scope: str, fused: bool) -> Iterator[Run]:
    computation = program.computations[name]
    for instruction in computation.values():
        yield Run(instruction, computation, times, scope, fused)
        opcode = instruction.opcode
        if opcode == "while":
            body = instruction.computation("body")
            yield from _walk(program, body, times * trip_count(program, computation, instruction), body, False)
        elif opcode in ("fusion", "async-start"):
            yield from _walk(program, instruction.computation("calls"), times, scope, fused or opcode == "fusion")
        elif opcode == "call":
            yield from _walk(program, instruction.computation("to_apply"), times, scope, fused)
        elif opcode == "conditional":
            branches = instruction.computations("branch_computations") or [
                instruction.computation(f"{side}_computation") for side in ("true", "false")
            ]
            for branch in branches:
                yield from _walk(program, branch, times, branch, False)


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int:
    """How often a `while` turns: from XLA's own note, or from a counter that starts, steps and ends at constants.

    The CPU and GPU compilers note `known_trip_count`; the TPU compiler leaves only the comparison in the condition.

    Raises:
      Trips: neither is there.
    """
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if noted:
        return int(noted[1])
    condition = program.computations[loop.computation("condition")]
    body = program.computations[loop.computation("body")]
    try:
        return _counted(program, computation, loop, condition, body)
    except (KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise Trips(f"the loop {loop.name} does not count between constants: {condition.root}") from error


def _counted(program, computation, loop, condition, body) -> int:
    # What the condition compares, seen through a fusion of the comparison.
    compare, resolve = condition.root, functools.partial(_through, condition)
    if compare.opcode == "fusion":
        fused = program.computations[compare.computation("calls")]
        arguments = [resolve(name) for name in compare.operands]
        compare, resolve = fused.root, functools.partial(_through, fused, arguments=arguments)
    counter, limit = (resolve(name) for name in compare.operands)
    index = int(re.search(r"\bindex=(\d+)", counter.attributes)[1])
    initial = computation[loop.operands[0]]
    start = _constant(_through(computation, initial.operands[index]))
    if limit.opcode == "get-tuple-element":  # the limit is carried along
        carried = int(re.search(r"\bindex=(\d+)", limit.attributes)[1])
        unchanged = _through(body, body.root.operands[carried])
        if int(re.search(r"\bindex=(\d+)", unchanged.attributes)[1]) != carried:
            raise ValueError(unchanged)
        limit = _through(computation, initial.operands[carried])
    end = _constant(limit)
    step = _step(program, body, _through(body, body.root.operands[index]))
    direction = re.search(r"\bdirection=(\w+)", compare.attributes)[1]
    span = {"LT": end - start, "LE": end - start + 1, "GT": start - end, "GE": start - end + 1, "NE": end - start}
    if direction in ("GT", "GE"):
        step = -step
    return max(0, -(-span[direction] // step))


def _step(program, body, update) -> int:
    """By how much a turn changes the counter."""
    within, arguments = body, None
    if update.opcode == "fusion":
        within = program.computations[update.computation("calls")]
        arguments = [_through(body, name) for name in update.operands]
        update = within.root
    if update.opcode not in ("add", "subtract"):
        raise ValueError(update)
    operands = [_through(within, name, arguments=arguments) for name in update.operands]
    value = _constant(next(operand for operand in operands if operand.opcode == "constant"))
    return -value if update.opcode == "subtract" else value


def _through(computation, name, *, arguments=None) -> Instruction:
    """What an operand is, behind copies; in a fusion, behind its parameters too."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start", "convert"):
        instruction = computation[instruction.operands[0]]
    if instruction.opcode == "parameter" and arguments is not None:
        return arguments[int(instruction.operands[0])]
    return instruction


def _constant(instruction: Instruction) -> int:
    if instruction.opcode != "constant":
        raise ValueError(instruction)
    return int(instruction.operands[0])


def _instruction(name: str, rest: str) -> Instruction:
    """From "TYPE OPCODE(OPERANDS), ATTRIBUTES"."""
    end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
    type_text, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _balanced(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    return Instruction(name, type_text, rest[:opening], tuple(_operands(inside)), rest[closing:])


def _operands(inside: str) -> Iterator[str]:
    """Names among operands that may carry their types, as "f32[2]{0} %a, %b"."""
    depth, word = 0, ""
    for character in [*inside, ","]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found = _NAME.search(word.strip())
            if word.strip():
                yield found[1] if found and not word.strip().isdigit() else word.strip()
            word = ""
        else:
            word += character


def _balanced(text: str, opening: int) -> int:
    """Position behind the bracket that closes the one at `opening`."""
    depth = 0
    for position in range(opening, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position + 1
    raise ValueError(f"unbalanced brackets: {text[:200]}")
