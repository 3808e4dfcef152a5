"""What XLA is told beyond its defaults, by platform: `compiler_options` of `jax.jit` and of `lower(...).compile`."""

# YNNPACK's fused loops allocate every result anew, which costs as much as what they calculate: without them a training step
# of 100 million parameters took 0.67 of its time and encoding with DC-AE 0.78 (benchmarks/cpu_peers.py), products alone the same.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}


def compiler_options(platform: str) -> dict[str, str]:
    """For programs on devices of a platform ("cpu", "gpu", "tpu")."""
    return dict(_CPU) if platform == "cpu" else {}
