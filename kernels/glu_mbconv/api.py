"""The gated middle of SANA's Mix-FFN (section 2.2 of SANA): everything between its two 1x1 convolutions.

On TPUs it is the kernels of `pallas_tpu`, elsewhere XLA's operations; those of `pallas_gpu` run on Hopper GPUs where they are asked
for. XLA cannot partition the kernels, so that under a mesh they have to be called within `jax.shard_map`.
"""

from jaxtyping import Array, Float
from sana_jax.kernels.choice import choose, run

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
_PACKAGE = __name__.rpartition(".")[0]


def gated_depthwise(
    value: Float[Array, "B H W C"],
    gate: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw C2"],
    bias: Float[Array, "C2"],
    row_padding: int = 1,
    implementation: str | None = None,
) -> Float[Array, "B h W C"]:
    r"""$a\,\mathrm{SiLU}(g)$ with $[a \mid g] = \mathrm{DWConv}(\mathrm{SiLU}([value \mid gate])) + b$.

    Args:
      value, gate: the halves of the expanded activation.
      kernel, bias: of both halves, the value's channels first.
      row_padding: that of `depthwise_conv`: 1, or 0 where value and gate bring the rows above and below along.
      implementation: "xla", "pallas_tpu" or "pallas_gpu" (Hopper, bfloat16); None takes the kernels on a TPU where they can work
        on these arrays.

    Raises:
      ValueError: the implementation is unknown or cannot work on these arrays, or the shapes do not agree.
    """
    if value.shape != gate.shape or kernel.shape[-1] != 2 * value.shape[-1]:
        raise ValueError(
            f"value is {value.shape}, gate {gate.shape} and the kernel has {kernel.shape[-1]} channels; value and gate "
            "must agree, and the kernel have the channels of both."
        )
    if bias.shape != kernel.shape[-1:]:
        raise ValueError(f"bias is {bias.shape} and the kernel has {kernel.shape[-1]} channels; they must agree.")
    options = {"row_padding": row_padding, "only_asked": ("pallas_gpu",)}
    choice = choose(_PACKAGE, IMPLEMENTATIONS, implementation, value, gate, kernel, **options)
    return run(_PACKAGE, choice, "gated_depthwise", value, gate, kernel, bias, row_padding=row_padding)
