"""What a compiled step needs and what it can reach at best, for people and as JSON.

Everything here is the compiler's word or a bound; nothing is a measurement. The step takes at least as long as the longest of

    compute       model operations at the chip's bf16 peak (`sana_jax.flops`: rematerialisation not counted),
    memory        what the compiled program reads and writes, at the HBM's bandwidth (`traffic`),
    interconnect  sending the collectives' bytes over all links at once (`collectives`),

which a perfect schedule would hide behind each other; model operations over what the chips could do in that time bound MFU.
"""

import dataclasses
import re
from typing import NamedTuple

from sana_jax.aot.collectives import Total
from sana_jax.parallel.chips import Chip

GB = 1e9


class Memory(NamedTuple):
    """Bytes of one device.

    Attributes:
      arguments: state, frozen weights and batch.
      outputs: the new state and the metrics.
      aliased: outputs that take the place of arguments.
      temporaries: activations, gathered weights, gradients.
      program: the machine code.
      beside: arrays that live meanwhile and that the program does not take, as the batches of the steps to come.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    program: int
    beside: int = 0

    @property
    def peak(self) -> int:
        """What has to fit."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.program + self.beside


class Show(NamedTuple):
    """The compiled drawing of held-out pictures; without `memory` the compiler refused it and `refusal` says why."""

    memory: Memory | None
    refusal: tuple[str, ...]
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
    """One compiled configuration; without `memory` the compiler refused it and `refusal` says why.

    Attributes:
      topology, compiler: what was compiled for, and by what.
      chip: its published peaks.
      devices: of the whole mesh, in JAX's count (tpu7x has two a chip).
      mesh: axis -> size.
      parameters, frozen_parameters: that train, and that do not.
      step_flops: model operations of a step on all chips.
      traffic: bytes that a device reads from and writes to its memory in a step.
      collectives: kind -> executions and bytes a device sends in a step.
      memory_share: of a device's memory that a run gets: on GPUs JAX takes 0.75 of it, if no variable says otherwise.
      show: what drawing the held-out pictures needs; None: not compiled.
    """

    topology: str
    chip: Chip
    compiler: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    frozen_parameters: int
    step_flops: int
    memory: Memory | None
    traffic: int
    collectives: dict[str, Total]
    refusal: tuple[str, ...]
    compile_seconds: float
    memory_share: float = 1.0
    show: Show | None = None

    @property
    def hbm(self) -> float:
        """Bytes of a device's memory that a run gets."""
        return self.chip.hbm_bytes / self.chip.devices * self.memory_share

    @property
    def fits(self) -> bool:
        """Whether the compiler took all that was compiled and the memory that a run gets is enough."""
        return self._enough(self.memory) and (self.show is None or self._enough(self.show.memory))

    def _enough(self, memory: Memory | None) -> bool:
        return memory is not None and memory.peak <= self.hbm

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds that a step takes at least, by what limits it."""
        chips = self.devices / self.chip.devices
        bounds = {"compute": self.step_flops / chips / self.chip.flops}
        if self.memory is not None:
            moved = self.traffic * self.chip.devices
            sent = sum(total.sent for kind, total in self.collectives.items() if kind != BETWEEN) * self.chip.devices
            bounds["memory"] = moved / self.chip.hbm_bandwidth
            bounds["interconnect"] = sent / self.chip.interconnect
        return bounds

    @property
    def step_seconds(self) -> float:
        """The largest of the bounds."""
        return max(self.bounds.values())

    @property
    def mfu(self) -> float:
        """Model operations over what the chips could do in the bound's time."""
        return self.bounds["compute"] / self.step_seconds

    def to_json(self) -> dict:
        """Plain values, the derived ones included."""
        values = dataclasses.asdict(self) | {"chip": self.chip.name}
        values["memory"] = self._memory_json(self.memory)
        values["show"] = self.show and self.show._asdict() | {"memory": self._memory_json(self.show.memory)}
        values["collectives"] = {kind: total._asdict() for kind, total in self.collectives.items()}
        values["bound_seconds"] = self.bounds
        return values | {"fits": self.fits, "step_seconds": self.step_seconds, "mfu": self.mfu}

    def _memory_json(self, memory: Memory | None) -> dict | None:
        return memory and memory._asdict() | {"peak": memory.peak, "hbm": self.hbm}

    def __str__(self) -> str:
        axes = ", ".join(f"{name} {size}" for name, size in self.mesh.items())
        lines = [
            f"{self.topology}: {self.devices} devices ({axes}), batch {self.batch_size:,}",
            f"parameters      {self.parameters:,}, and {self.frozen_parameters:,} frozen",
            *(self._compiled() if self.memory else self._refused(self.refusal)),
            *(self._shown() if self.show else ()),
            f"The step was compiled in {self.compile_seconds:.0f} s by {self.compiler}. These are the compiler's estimates "
            "and bounds from published peaks, not measurements.",
        ]
        return "\n".join(lines)

    def _compiled(self) -> list[str]:
        bounds = self.bounds
        lines = [
            *self._memory_lines(self.memory, "batches beside the step's own"),
            f"traffic         {self.traffic / GB:,.1f} GB a step between a device and its memory",
            "collectives     in a step; bytes that a device sends",
            *(
                f"                {kind:18} {total.count:6,} {total.sent / GB:9.3f} GB"
                for kind, total in self.collectives.items()
            ),
            f"model FLOPs     {self.step_flops / 1e12:,.1f} T a step",
            f"step takes      at least {self.step_seconds:.3f} s ("
            + ", ".join(f"{name} {seconds:.3f}" for name, seconds in bounds.items())
            + f"): {self.batch_size / self.step_seconds:,.0f} images/s, MFU at most {self.mfu:.0%}",
        ]
        return lines

    def _memory_lines(self, memory: Memory, beside: str) -> list[str]:
        fits = "fits" if self._enough(memory) else "DOES NOT FIT"
        return [
            f"memory a device {fits}: {memory.peak / GB:.2f} of {self.hbm / GB:.1f} GB{self._share()}",
            f"                arguments {memory.arguments / GB:.2f}, results {memory.outputs / GB:.2f} "
            f"({memory.aliased / GB:.2f} in place), temporaries {memory.temporaries / GB:.2f}, program "
            f"{memory.program / GB:.2f}, {beside} {memory.beside / GB:.2f} GB",
        ]

    def _shown(self) -> list[str]:
        shown = self.show
        return [
            f"held-out pictures, compiled in {shown.compile_seconds:.0f} s:",
            *(
                self._memory_lines(shown.memory, "batches and the rest of the state")
                if shown.memory
                else self._refused(shown.refusal)
            ),
        ]

    def _refused(self, refusal: tuple[str, ...]) -> list[str]:
        return [
            f"memory a device DOES NOT FIT in {self.hbm / GB:.1f} GB{self._share()}; the compiler says:",
            *refusal,
        ]

    def _share(self) -> str:
        if self.memory_share == 1:
            return ""
        return f" ({self.memory_share:.0%} of the card; XLA_CLIENT_MEM_FRACTION sets it)"


def out_of_memory(message: str) -> tuple[str, ...]:
    """The compiler's refusal in few lines: how much it wanted of how much, and its five largest allocations."""
    lines = message.splitlines()
    wanted = next((line for line in lines if "Ran out of memory" in line or "RESOURCE_EXHAUSTED" in line), lines[0])
    summary = [wanted[wanted.find("Ran out of memory") :] if "Ran out of memory" in wanted else wanted]
    for start, line in enumerate(lines):
        size = re.match(r"\s*\d+\. Size: (\S+)", line)
        if size:
            details = {}
            for detail in lines[start + 1 : start + 12]:
                key, colon, value = detail.strip().partition(": ")
                if not colon or re.match(r"\d+\. Size", detail.strip()):
                    break
                details[key] = value
            shape = details.get("Unpadded size", "")
            summary.append(
                f"  {size[1]:>8} {details.get('Shape', shape)} {details.get('Operator', details.get('Allocation type', ''))}"
            )
    return tuple(line[:240] for line in summary[:6])


BETWEEN = "between slices"
