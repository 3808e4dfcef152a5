"""What XLA is told beyond its defaults, by platform: `compiler_options` of `jax.jit` and of `lower(...).compile`."""

# Of YNNPACK's fusions only single products are kept, which have bfloat16's matrix instructions: its loops and softmax allocate
# every result anew, and page faults cost what they calculate. With this line DC-AE's row of benchmarks/cpu_peers.py encodes in 0.71
# of the time and its training step takes 0.69; without single products too, its bfloat16 row would take 1.7 times as long.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def compiler_options(platform: str) -> dict[str, str]:
    """For programs on devices of a platform ("cpu", "gpu", "tpu")."""
    return dict(_CPU) if platform == "cpu" else {}
