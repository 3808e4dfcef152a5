r"""What a step sends from chip to chip, by the compiled program: how often, and how many bytes.

Bytes are those that each device sends, and receives as many, if every collective runs as a ring over its group of g devices:

    all-gather to o bytes             o (g-1)/g
    reduce-scatter of p bytes         p (g-1)/g
    all-reduce of p bytes             2 p (g-1)/g
    all-to-all of p bytes             p (g-1)/g
    permute, or send to other slices  p

An all-reduce of which each device keeps one of s shards is a reduce-scatter over the group and, where s < g, an
all-gather among the g/s devices that keep the same shard: p (g-1)/g + p/s - p/g. The TPU compiler writes its reduce-scatters
so. An asynchronous collective counts once, whatever its start, its steps and its end are fused with; in a loop, once a turn.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from sana_jax.aot import hlo

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "between slices",
)
_ALIASES = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}
_MOVED = ("bitcast", "copy", "reshape", "transpose", "convert")


class Collective(NamedTuple):
    """One collective of the program.

    Attributes:
      kind: of KINDS.
      group: devices that take part together.
      payload: bytes of the array before an all-reduce, reduce-scatter, all-to-all, permute, and after an all-gather.
      sent: bytes that each device sends in one execution.
      times: executions in a step.
      where: from which line of the model it comes, as XLA's metadata say.
    """

    kind: str
    group: int
    payload: int
    sent: float
    times: int
    where: str


class Total(NamedTuple):
    """Of one kind: executions in a step, and bytes that a device sends in a step."""

    count: int
    sent: int


def totals(collectives: list[Collective]) -> dict[str, Total]:
    """Sums by kind, in the order of KINDS; kinds that do not occur are left out."""
    out = {}
    for kind in KINDS:
        ours = [c for c in collectives if c.kind == kind]
        if ours:
            out[kind] = Total(sum(c.times for c in ours), round(sum(c.times * c.sent for c in ours)))
    return out


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program's text; those among one device only are left out.

    Raises:
      hlo.Trips: a loop's number of turns is not in the text.
    """
    program = hlo.parse(text)
    return [c for c in _collectives(program) if c.group > 1]


def _collectives(program: hlo.Program) -> Iterator[Collective]:
    seen = set()
    for run in hlo.executed(program):
        kind = run.instruction.opcode.removesuffix("-start")
        kind = _ALIASES.get(kind, kind)
        if kind == "send" and "is_host_transfer=true" in run.instruction.attributes:
            kind = "between slices"
        if kind not in KINDS:
            continue
        channel = re.search(r"\bchannel_id=(\d+)", run.instruction.attributes)
        if run.fused and channel:
            # The parts of an asynchronous collective are copies of it, in fusions of one loop body.
            identity = (run.scope, kind, channel[1])
            if identity in seen:
                continue
            seen.add(identity)
        yield _account(program, run, kind)


def _account(program: hlo.Program, run: hlo.Run, kind: str) -> Collective:
    instruction = run.instruction
    sizes = hlo.array_bytes(instruction.type)
    if kind == "between slices":
        # (array, context, token): the other slices receive it through their hosts.
        return Collective(kind, 2, sizes[0], sizes[0], run.times, _where(instruction))
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        arrays = len(instruction.operands)  # the type names operands, results, and of some contexts
        sizes = sizes[arrays : 2 * arrays]
    group, size = group_size(instruction.attributes, program.partitions), sum(sizes)
    if kind == "all-gather":
        payload, sent = size, size * (group - 1) / group
    elif kind == "reduce-scatter":
        payload, sent = size * group, size * (group - 1)
    elif kind == "all-reduce":
        payload, shards = size, _shards_kept(run, size)
        sent = size * (group - 1) / group + size / shards - size / group
        kind = "reduce-scatter" if shards > 1 else kind
    elif kind == "all-to-all":
        payload, sent = size, size * (group - 1) / group
    else:
        payload, sent, group = size, size, max(group, 2)
    return Collective(kind, group, payload, sent, run.times, _where(instruction))


def _shards_kept(run: hlo.Run, size: int) -> int:
    """Into how many parts a fused all-reduce's result is cut, of which the fusion keeps one; 1: it keeps all."""
    root = getattr(run.within, "root", None)
    if not run.fused or root is None:
        return 1
    source = root
    while source.opcode in (*_MOVED, "dynamic-slice") and source.operands[0] in run.within:
        source = run.within[source.operands[0]]
        if source is run.instruction:
            return max(1, round(size / sum(hlo.array_bytes(root.type))))
    return 1


def group_size(attributes: str, partitions: int) -> int:
    """Devices of a group, from any of XLA's three ways to write `replica_groups`, or from a permute's pairs.

    {{0,1},{2,3}} lists them; [4,2]<=[8] says 4 groups of 2; mesh['a'=4,'b'=2] {'b'} names the axes they run along, whole or,
    as 'b':(1)2, in part. Nothing written, or {}, is all devices.
    """
    listed = re.search(r"\breplica_groups=\{\{([\d, ]*)\}", attributes)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"\breplica_groups=\[(\d+),(\d+)\]<=", attributes)
    if iota:
        return int(iota[2])
    mesh = re.search(r"\breplica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        group = 1
        for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2]):
            group *= int(part) if part else sizes[name]
        return group
    return partitions


def _where(instruction: hlo.Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return found[1] if found else ""
