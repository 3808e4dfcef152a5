"""The gated middle of SANA's Mix-FFN (section 2.2 of SANA): everything between its two 1x1 convolutions.

On TPUs it is the kernels of `pallas_tpu`, elsewhere XLA's operations. XLA cannot partition the kernels, so that under a mesh
they have to be called within `jax.shard_map`.
"""

import functools

from jax import lax
from jaxtyping import Array, Float
from sana_jax.kernels.glu_mbconv import pallas_tpu, xla
from sana_jax.kernels.glu_mbconv.xla import silu

__all__ = ["gated_depthwise", "silu"]

_BACK_ENDS = {"xla": xla, "pallas_tpu": pallas_tpu}


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
      implementation: "xla" or "pallas_tpu"; None takes the kernels on a TPU where they can work on these arrays.

    Raises:
      ValueError: the implementation is unknown or cannot work on these arrays, or the shapes do not agree.
    """
    if implementation not in (None, *_BACK_ENDS):
        raise ValueError(f"implementation={implementation!r} is unknown; use None, {' or '.join(_BACK_ENDS)}.")
    if value.shape != gate.shape or kernel.shape[-1] != 2 * value.shape[-1]:
        raise ValueError(
            f"value is {value.shape}, gate {gate.shape} and the kernel has {kernel.shape[-1]} channels; value and gate "
            "must agree, and the kernel have the channels of both."
        )
    refusal = pallas_tpu.refusal(value, gate, kernel, row_padding=row_padding)
    if refusal and implementation == "pallas_tpu":
        raise ValueError(f"implementation='pallas_tpu' cannot run: {refusal}. Use 'xla', or None.")
    arrays = value, gate, kernel, bias
    if refusal or implementation == "xla":
        return xla.gated_depthwise(*arrays, row_padding)
    if implementation == "pallas_tpu":
        return pallas_tpu.gated_depthwise(*arrays, row_padding)
    on_tpu, default = (functools.partial(_run, module, row_padding) for module in (pallas_tpu, xla))
    return lax.platform_dependent(*arrays, tpu=on_tpu, default=default)


def _run(module, row_padding, *arrays):
    return module.gated_depthwise(*arrays, row_padding)
