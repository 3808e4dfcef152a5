"""What a compiled step moves between a device and its memory (HBM), by the program's text.

Every instruction that runs reads its operands and writes its results once, however much of them a fusion computes on the
way. A slice, a gather and an update in place move only the part that they take or change, in a fusion too. What the TPU
compiler keeps on the chip (VMEM, a memory space of its layouts) moves nothing. A kernel that moves less than its operands says so
in an attribute, `bytes_accessed`.
"""

import re
from collections import defaultdict

from sana_jax.aot import hlo

# What computes nothing, or runs instructions that are counted themselves.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast opt-barrier after-all partition-id replica-id domain "
    "while conditional call async-start async-update async-done".split()
)
_PARTS = ("slice", "dynamic-slice", "gather")
_DECLARED = re.compile(r'frontend_attributes=\{[^}]*\bbytes_accessed="(\d+)"')


def traffic(text: str) -> int:
    """Bytes read and written in a step by one device.

    Raises:
      hlo.Trips: a loop's number of turns is not in the text.
    """
    program = hlo.parse(text)
    return sum(
        run.times * _moved(program, run.within, run.instruction) for run in hlo.executed(program) if not run.fused
    )


def _moved(program: hlo.Program, within: hlo.Computation, instruction: hlo.Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "fusion":
        return _moved_by_fusion(program, within, instruction)
    if opcode == "custom-call" and (declared := _DECLARED.search(instruction.attributes)):
        return int(declared[1])
    operands, results = [_stored(within[name].type) for name in instruction.operands], _stored(instruction.type)
    if opcode in _PARTS:
        return min(sum(operands), _size(instruction.type)) + results
    if opcode == "dynamic-update-slice":
        return operands[1] + min(results, _size(within[instruction.operands[1]].type))
    if opcode == "scatter":  # reads the updates, and reads and writes their places
        return 3 * _stored(within[instruction.operands[-1]].type)
    if opcode.removesuffix("-start") in _PARTS:  # (operands, part, context)
        size, on_chip = hlo.arrays(instruction.type)[len(operands)]
        return min(sum(operands), size) + (0 if on_chip else size)
    if opcode.endswith("-start") and opcode != "all-reduce-start":  # its result holds its operands too
        results = max(0, results - sum(operands))
    return sum(operands) + results


def _moved_by_fusion(program, within, instruction) -> int:
    called = program.computations[instruction.computation("calls")]
    parameters = {int(x.operands[0]): x.name for x in called.values() if x.opcode == "parameter"}
    moved = 0
    for index, name in enumerate(instruction.operands):
        stored = _stored(within[name].type)
        if stored:
            moved += min(stored, _read(program, called, parameters[index]))
    roots = called.root.operands if called.root.opcode == "tuple" else [called.root.name]
    results = hlo.arrays(instruction.type)
    if len(roots) != len(results):
        return moved + _stored(instruction.type)
    return moved + sum(
        min(size, _written(program, called, root)) for root, (size, on_chip) in zip(roots, results) if not on_chip
    )


def _read(program, computation, name) -> int:
    """Bytes that a fused computation needs of its parameter."""
    read, whole = 0, _size(computation[name].type)
    for user in _users(computation)[name]:
        if user.opcode in _PARTS and user.operands[0] == name:
            read += _size(user.type)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue
        elif user.opcode == "bitcast":
            read += _read(program, computation, user.name)
        elif user.opcode == "fusion":
            called = program.computations[user.computation("calls")]
            for inner in called.values():
                if inner.opcode == "parameter" and user.operands[int(inner.operands[0])] == name:
                    read += _read(program, called, inner.name)
        elif user.opcode != "tuple":
            return whole
    return min(read, whole)


def _written(program, computation, name) -> int:
    """Bytes of a fused computation's result that are not left as they were."""
    instruction = computation[name]
    while instruction.opcode == "bitcast":
        instruction = computation[instruction.operands[0]]
    if instruction.opcode == "dynamic-update-slice":
        return _size(computation[instruction.operands[1]].type)
    if instruction.opcode == "fusion":
        called = program.computations[instruction.computation("calls")]
        if called.root.opcode != "tuple":
            return _written(program, called, called.root.name)
    return _size(instruction.type)


def _users(computation: hlo.Computation) -> dict[str, list[hlo.Instruction]]:
    """Name -> the instructions that take it, each once."""
    if not hasattr(computation, "users"):
        computation.users = defaultdict(list)
        for instruction in computation.values():
            for name in dict.fromkeys(instruction.operands):
                computation.users[name].append(instruction)
    return computation.users


def _size(type_text: str) -> int:
    return sum(size for size, _ in hlo.arrays(type_text))


def _stored(type_text: str) -> int:
    """Bytes of the arrays that are not kept on the chip."""
    return sum(size for size, on_chip in hlo.arrays(type_text) if not on_chip)
