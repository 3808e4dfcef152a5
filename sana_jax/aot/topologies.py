"""Accelerators that are not here: devices of a topology, for which XLA compiles on a CPU host.

TPU topologies come from libtpu, which needs no TPU for it. An H100 comes from JAX's CUDA plug-in, which needs no GPU; it has to
be told what the GPU would have told it. Programs compiled so can be inspected, not run.
"""

import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from sana_jax.parallel.chips import Chip, chip_of_topology

# Chips whose topologies are grids of so many dimensions.
_TPU_DIMENSIONS = {"v5e": 2, "v6e": 2, "v5p": 3, "tpu7x": 3}
_EXAMPLES = "v5e:16x16, v6e:16x16, v5p:8x8x8, tpu7x:4x4x4, h100, h100:8; several slices: v5e:16x16*2"
_SYNTAX = re.compile(r"(?P<chip>\w+)(:(?P<shape>\d+(x\d+)*))?(\*(?P<slices>\d+))?")

# What XLA would have read from the driver of an H100 SXM (its GpuTargetConfig).
_H100_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# XLA times its Triton products on the GPU to choose their tiles. Without one it may choose tiles that do not compile:
# "Couldn't find output tile sizes that satisfy". The products go to cuBLAS instead.
_H100_OPTIONS = {"xla_gpu_enable_triton_gemm": False}

MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # JAX reads both; the second is older


class Topology(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: as asked for.
      chip: what is published of its chips.
      devices: of all slices; usable in a mesh, and for nothing that runs.
      slices: parts that only a data-centre network joins.
      compiler: the package whose compiler it is, and its version.
      options: of the compiler, by XLA's names.
      memory_share: of a device's memory that JAX takes.
    """

    name: str
    chip: Chip
    devices: list[jax.Device]
    slices: int
    compiler: str
    options: dict[str, bool]
    memory_share: float = 1.0


def open_topology(name: str) -> Topology:
    """The topology of a name such as "v5e:16x16" (chips per side), "v5e:16x16*2" (two slices) or "h100:8".

    Call it before JAX has looked for devices: this process is to have no accelerator but those that it compiles for.

    Raises:
      ValueError: there is no such topology.
      ModuleNotFoundError: the compiler's package is not installed; says which.
    """
    match = _SYNTAX.fullmatch(name)
    if not match:
        raise ValueError(f"--aot={name!r} is no topology; known are {_EXAMPLES}.")
    chip, shape, slices = match["chip"], match["shape"] or "", int(match["slices"] or 1)
    jax.config.update("jax_platforms", "cpu")
    if chip == "h100":
        return _open_h100(name, shape or "1", slices)
    if chip not in _TPU_DIMENSIONS or shape.count("x") + 1 != _TPU_DIMENSIONS[chip] or slices < 1:
        raise ValueError(f"--aot={name!r} is no topology; known are {_EXAMPLES}.")
    return _open_tpu(name, f"{chip}:{shape}", slices)


def _open_tpu(name: str, single: str, slices: int) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"--aot={name} needs libtpu, which compiles for TPUs on any machine: pip install -e '.[aot]' "
            '(or pip install "jax[tpu]").'
        )
    from importlib.metadata import version

    # Without these libtpu asks Google Cloud's metadata server what machine this is, and refuses a second process.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(single, platform="tpu", num_slices=slices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--aot={name}: {str(error).splitlines()[0]}. Known are {_EXAMPLES}.") from error
    return Topology(name, chip_of_topology(name), list(found.devices), slices, f"libtpu {version('libtpu')}", {})


def _open_h100(name: str, count: str, slices: int) -> Topology:
    from importlib.metadata import PackageNotFoundError, version

    try:
        plugin = f"jax-cuda13-plugin {version('jax-cuda13-plugin')}"
    except PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"--aot={name} needs JAX's CUDA plug-in, which no GPU is needed for: pip install \"jax[cuda13]=="
            f'{jax.__version__}", best in an environment of its own.'
        ) from error
    if not count.isdigit() or slices != 1:
        raise ValueError(f"--aot={name!r}: H100s of one host are h100 or h100:8.")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    _name_gpus_without_one()
    shape = f"1x1x{count}"
    found = topologies.get_topology_desc("h100", platform="cuda", topology=shape, target_config=_H100_TARGET)
    devices = list(found.devices)
    return Topology(name, chip_of_topology(name), devices, 1, plugin, _H100_OPTIONS, gpu_memory_share())


def gpu_memory_share() -> float:
    """The part of a GPU's memory that a run in this environment takes: JAX's 0.75, or what XLA_CLIENT_MEM_FRACTION says.

    Raises:
      ValueError: the variable is no number above 0 and up to 1.
    """
    for variable in MEMORY_VARIABLES:
        value = os.environ.get(variable)
        if not value:
            continue
        try:
            share = float(value)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise ValueError(
                f"{variable}={value} is no part of a GPU's memory. Use a number above 0 and up to 1, as 0.92."
            )
        return share
    return 0.75


def _name_gpus_without_one() -> None:
    """Lets "gpu" mean CUDA where no GPU is: JAX looks for one to tell CUDA from ROCm (jax issue 23971).

    A private interface, touched in the process that compiles and nowhere else.
    """
    from jax._src import xla_bridge

    ask = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda platform: "cuda" if platform == "gpu" else ask(platform)
