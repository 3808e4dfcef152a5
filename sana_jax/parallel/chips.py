"""What the makers publish of the accelerators that a run may meet: the peaks that MFU and rooflines are measured against.

Sources, read in November 2026: docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p-training, /v6e and /tpu7x (bf16 peak, HBM and
ICI per chip; the ICI of v4 from Jouppi et al. 2023, "TPU v4", table 4: 6 links of 50 GB/s); NVIDIA's data sheets of A100,
H100 and H200 (SXM modules; bf16 without sparsity). The units of HBM capacity are the published ones.
"""

from typing import NamedTuple

GB, GIB, TERA = 10**9, 2**30, 10**12


class Chip(NamedTuple):
    """Peaks of one chip.

    Attributes:
      name: as topologies are named ("v5p" of "v5p:4x4x4").
      device_kinds: what `jax.Device.device_kind` says.
      flops: dense bf16 operations per second, a multiply-add being two.
      hbm_bytes: memory.
      hbm_bandwidth: bytes per second.
      interconnect: bytes per second that a chip sends over all of its links, while it receives as many; half of what is
        published as bidirectional (ICI, NVLink).
      devices: JAX devices that share the chip, its memory and its peaks.
    """

    name: str
    device_kinds: tuple[str, ...]
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    interconnect: float
    devices: int = 1


CHIPS = (
    Chip("v4", ("TPU v4",), 275 * TERA, 32 * GIB, 1200 * GB, 300 * GB),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197 * TERA, 16 * GB, 819 * GB, 200 * GB),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459 * TERA, 95 * GIB, 2765 * GB, 600 * GB),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918 * TERA, 32 * GB, 1638 * GB, 400 * GB),
    Chip("tpu7x", ("TPU7x",), 2307 * TERA, 192 * GIB, 7380 * GB, 600 * GB, devices=2),
    Chip("a100", ("NVIDIA A100-SXM4-80GB",), 312 * TERA, 80 * GB, 2039 * GB, 300 * GB),
    Chip("a100-40gb", ("NVIDIA A100-SXM4-40GB",), 312 * TERA, 40 * GB, 1555 * GB, 300 * GB),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989.4 * TERA, 80 * GB, 3350 * GB, 450 * GB),
    Chip("h200", ("NVIDIA H200",), 989.4 * TERA, 141 * GB, 4800 * GB, 450 * GB),
)


def chip_of_topology(topology: str) -> Chip:
    """The chip of a topology's name, e.g. "v5p:4x4x4" or "h100".

    Raises:
      ValueError: there is no such chip in the table.
    """
    name = topology.split(":")[0]
    for chip in CHIPS:
        if chip.name == name:
            return chip
    raise ValueError(f"topology {topology!r}: {name!r} is not one of {', '.join(chip.name for chip in CHIPS)}.")


def chip_of_device(device_kind: str) -> Chip | None:
    """The chip of a device, by `jax.Device.device_kind`; None for CPUs and whatever else is not in the table."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)
