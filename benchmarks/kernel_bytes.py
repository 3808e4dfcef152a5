"""What whole layers move between a TPU and its memory with the kernels of `kernels/` and without, by the compiled programs.

    python benchmarks/kernel_bytes.py               # compiles the rows that are not yet in the result, one after the other
    python benchmarks/kernel_bytes.py --only=v5e    # of these, the rows whose name contains a text
    python benchmarks/kernel_bytes.py --print       # the table of what is there

Needs libtpu (`pip install -e '.[aot]'`) and no TPU. A row takes a few minutes of one core and is written to
benchmarks/results/kernel_bytes.json at once (`compiled_rows`). Each layer is compiled alone, in bfloat16, forward and forward with
backward, in four forms: with XLA's operations or the kernels, and with q, k and v (value and gate) from one product that is split or from
a product each (`dense_parts` does that on TPUs). Two counts are given: the bytes of the memory (HBM), by `sana_jax.aot.traffic`,
which leaves out what the compiler keeps on the chip between operations; and XLA's own `bytes accessed`, which counts it. Nothing is run.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import compiled_rows
import jax
import jax.numpy as jnp
from flax import linen as nn
from provenance import ROOT, versions
from sana_jax.kernels.dense import api as dense
from sana_jax.kernels.glu_mbconv import pallas_tpu as gated_depthwise
from sana_jax.kernels.linear_attention import pallas_tpu as linear_attention

from sana_jax.aot.topologies import open_topology
from sana_jax.aot.traffic import traffic
from sana_jax.models.attention import SelfAttention
from sana_jax.models.feed_forward import MixFFN
from sana_jax.parallel.mesh import make_mesh

RESULT = ROOT / "benchmarks" / "results" / "kernel_bytes.json"
# Name -> whether the kernels are used, whether q, k and v come from one product.
FORMS = {
    "XLA, one product": (False, True),
    "XLA, a product each": (False, False),
    "kernels, one product": (True, True),
    "kernels, a product each": (True, False),
}
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


class Row(NamedTuple):
    """A layer on a chip.

    Attributes:
      layer: takes and returns an array of one shape.
      shape: of that array.
      topology: one of its chips is compiled for.
      back_end: the kernel's module. Its `refusal` says which arrays it cannot work on.
    """

    layer: nn.Module
    shape: tuple[int, ...]
    topology: str
    back_end: object


def attention_rows() -> dict[str, Row]:
    """Self-attention: projections to q, k and v, linear attention, output projection."""
    layers = (
        ("attention", (8, 1024, 2240), False, ("v5e", "v5p", "v6e")),
        ("attention with qk-norm", (8, 1024, 2240), True, ("v5e",)),
        ("attention", (1, 16384, 2240), False, ("v5e",)),
        ("attention", (8, 1024, 1152), False, ("v5e",)),
    )
    rows = {}
    for name, shape, qk_norm, chips in layers:
        layer = SelfAttention("linear", 32, qk_norm, 1e-15, clamp=False, dtype=jnp.bfloat16)
        for chip in chips:
            title = f"{name}, {shape[2]} wide, {shape[0]} x {shape[1]} tokens, {chip}"
            rows[title] = Row(layer, shape, TOPOLOGIES[chip], linear_attention)
    return rows


def mix_ffn_rows() -> dict[str, Row]:
    """The Mix-FFN: expansion, gated depthwise convolution, projection."""
    layers = (
        ((8, 32, 32, 2240), ("v5e", "v5p", "v6e")),
        ((1, 128, 128, 2240), ("v5e",)),
        ((8, 32, 32, 1152), ("v5e",)),
    )
    rows = {}
    for shape, chips in layers:
        layer = MixFFN(shape[-1] * 5 // 2, jnp.bfloat16)
        for chip in chips:
            title = f"Mix-FFN, {shape[3]} wide, {shape[0]} x {shape[1]}x{shape[2]} tokens, {chip}"
            rows[title] = Row(layer, shape, TOPOLOGIES[chip], gated_depthwise)
    return rows


ROWS = attention_rows() | mix_ffn_rows()


def main() -> int:
    return compiled_rows.run(__doc__.split("\n\n")[0], RESULT, ROWS, measure, table)


def measure(row: Row) -> dict:
    """Bytes of the layer's programs by form."""
    measured = {"versions": versions("jax", "libtpu")}
    shapes = jax.eval_shape(row.layer.init, jax.random.key(0), jnp.zeros(row.shape, jnp.bfloat16))
    mesh = make_mesh(1, 1, 1, devices=open_topology(row.topology).devices[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct(row.shape, jnp.bfloat16, sharding=place)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=place), shapes)
    for what, make, arguments in (("forward", forward, (params, x)), ("with backward", backward, (params, x, x))):
        measured[what] = {}
        for form, (kernels, one_product) in FORMS.items():
            with contextlib.ExitStack() as patches:
                if not kernels:
                    refused = mock.patch.object(row.back_end, "refusal", return_value="it is measured without")
                    patches.enter_context(refused)
                if one_product:
                    joint = {"_apart": dense._together, "_apart_backward": dense._together_backward}
                    patches.enter_context(mock.patch.multiple(dense, **joint))
                measured[what][form] = account(compile_for(mesh, make, row.layer, arguments))
    return measured


def forward(layer: nn.Module) -> Callable:
    return lambda params, x: layer.apply(params, x)


def backward(layer: nn.Module) -> Callable:
    def both(params, x, g):
        y, vjp = jax.vjp(layer.apply, params, x)
        return y, vjp(g)

    return both


def compile_for(mesh, make, layer, arguments) -> jax.stages.Compiled:
    with jax.set_mesh(mesh):
        return jax.jit(make(layer)).lower(*arguments).compile()


def account(compiled: jax.stages.Compiled) -> dict:
    """Both counts, and how many kernels the program calls."""
    text = compiled.as_text()
    return {
        "hbm": traffic(text),
        "bytes accessed": int(compiled.cost_analysis()["bytes accessed"]),
        "kernels": text.count("tpu_custom_call"),
    }


def table(rows: dict[str, dict]) -> str:
    """In Markdown, megabytes: XLA with one product / XLA with a product each / the kernels, as they are used."""
    lines = ["| layer | forward: HBM | XLA's count | with backward: HBM | XLA's count |", "|---|---|---|---|---|"]
    shown = [form for form in FORMS if form != "kernels, one product"]
    for name, row in rows.items():
        counts = [(what, count) for what in ("forward", "with backward") for count in ("hbm", "bytes accessed")]
        cells = [" / ".join(f"{row[what][form][count] / 1e6:,.0f}" for form in shown) for what, count in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
