"""What XLA is told beyond its defaults, by platform: `compiler_options` of `jax.jit` and of `lower(...).compile`."""

import functools
import pathlib


def compiler_options(platform: str) -> dict[str, str]:
    """For programs on devices of a platform ("cpu", "gpu", "tpu")."""
    if platform != "cpu":
        return {}
    instructions = _instructions()
    options = {"xla_cpu_experimental_ynn_fusion_type": ynn_fusions(instructions)}
    # XLA's loops have 256 bits otherwise. On an EPYC of Zen 4 a transformer in eight bits takes 0.96 of the time with 512, a
    # decoder 0.97, others the same (JAX 0.12). Not where nothing was measured: older processors lower their clock for them.
    return options | ({"xla_cpu_prefer_vector_width": "512"} if "avx512_bf16" in instructions else {})


def ynn_fusions(instructions: frozenset[str]) -> str:
    """What YNNPACK does of a program on a CPU; Eigen and XLA's own loops do the rest.

    Never loops and softmax: they allocate every result anew, and page faults cost what they calculate (DC-AE encodes in 0.71 of
    the time without them). Single products, where it knows instructions that Eigen does not, bfloat16's (1.7 times as fast with
    AMX, 2.5 times with AVX-512's), and where nothing was measured. With AVX-512 alone Eigen's products are faster: of rows of
    benchmarks/cpu_peers.py the transformer takes 0.86 of the time, in bfloat16 0.90, a text encoder 0.82, a training step 0.88,
    the embedded model 1.05.

    Args:
      instructions: of the processor, as Linux names them.
    """
    eigen = "avx512f" in instructions and "avx512_bf16" not in instructions
    return "" if eigen else "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


@functools.cache
def _instructions() -> frozenset[str]:
    """Of this machine's first processor; none where the system does not say."""
    return frozenset(next((line for line in cpuinfo() if line.startswith("flags")), "").split())


def cpuinfo() -> list[str]:
    """What Linux says of this machine's processors, a property a line; nothing elsewhere."""
    info = pathlib.Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.is_file() else []
