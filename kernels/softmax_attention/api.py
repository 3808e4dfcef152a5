"""Softmax attention: of the latent tokens to the text, and among themselves as the ablation of linear attention.

On CPUs it goes block by block, so that the logits stay in the cache; on NVIDIA GPUs it is cuDNN's kernel where that can work
on the arrays; elsewhere XLA sees the whole of it. In each way the derivative calculates the logits again, which takes less
time and memory than to keep them.
"""

import functools

from jax import lax
from jaxtyping import Array, Bool, Float
from sana_jax.kernels.derivatives import custom_vjp
from sana_jax.kernels.softmax_attention import blocks, cudnn, reference

_FORMS = {"whole": reference, "blocks": blocks, "cudnn": cudnn}


def softmax_attention(
    q: Float[Array, "B N C"],
    k: Float[Array, "B L C"],
    v: Float[Array, "B L C"],
    mask: Bool[Array, "B L"] | None = None,
    *,
    heads: int,
    implementation: str | None = None,
) -> Float[Array, "B N C"]:
    r"""$\mathrm{softmax}(q k^T / \sqrt{d} + m)\,v$ per head, d = C / heads; the softmax is float32.

    m is 0 where `mask` is true and -10000 elsewhere, as in the public code: a row whose mask is all false attends to all of
    its padding instead of giving NaN. The result has the dtype of q.

    Args:
      q, k, v: queries, keys and values; heads are consecutive groups of channels.
      mask: of the keys; None: all are seen.
      heads: divides C.
      implementation: "whole", all logits at once; "blocks", some heads and queries after the other; "cudnn". None: "blocks"
        on CPUs, "cudnn" on GPUs where it can work on these arrays, "whole" elsewhere.

    Raises:
      ValueError: `heads` does not divide the channels, or the implementation is unknown or cannot work on these arrays.
    """
    if implementation not in (None, *_FORMS):
        raise ValueError(f"implementation={implementation!r} is unknown; use None, {', '.join(_FORMS)}.")
    if q.shape[-1] % heads:
        raise ValueError(f"heads={heads} does not divide the {q.shape[-1]} channels; use a divisor of them.")
    if implementation == "cudnn" and (refusal := cudnn.refusal(q, k, v, heads=heads)):
        raise ValueError(f"implementation='cudnn' cannot run: {refusal}. Use 'whole', or None.")
    return _attend(q, k, v, mask, heads, implementation)


@functools.partial(custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, mask, heads, implementation):
    return _run(implementation, "softmax_attention", heads, q, k, v, mask)


def _forward(q, k, v, mask, heads, implementation):
    return _attend(q, k, v, mask, heads, implementation), (q, k, v, mask)


def _backward(heads, implementation, residuals, g):
    return *_run(implementation, "softmax_attention_vjp", heads, *residuals, g), None


_attend.defvjp(_forward, _backward)


def _run(implementation, function, heads, *arrays):
    forms = {name: functools.partial(getattr(form, function), heads=heads) for name, form in _FORMS.items()}
    if implementation is not None:
        return forms[implementation](*arrays)
    on_gpu = forms["whole" if cudnn.refusal(*arrays[:3], heads=heads) else "cudnn"]
    return lax.platform_dependent(*arrays, cpu=forms["blocks"], cuda=on_gpu, default=forms["whole"])
