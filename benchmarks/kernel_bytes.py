"""What whole layers move between a TPU and its memory with the kernels of `kernels/` and without, by the compiled programs.

    python benchmarks/kernel_bytes.py               # compiles the rows that are not yet in the result, one after the other
    python benchmarks/kernel_bytes.py --only=v5e    # of these, the rows whose name contains a text
    python benchmarks/kernel_bytes.py --print       # the table of what is there

Needs libtpu (`pip install -e '.[aot]'`) and no TPU. A row takes a few minutes of one core and is written to
benchmarks/results/kernel_bytes.json at once. Each layer is compiled alone, in bfloat16, forward and forward with backward, with
its own kernel and with XLA's form. Two counts are given: the bytes of the memory (HBM), by `sana_jax.aot.traffic`, which leaves out
what the compiler keeps on the chip between operations; and XLA's own `bytes accessed`, which counts it. Nothing is run.
"""

import argparse
import functools
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from flax import linen as nn
from sana_jax.kernels.linear_attention import pallas_tpu as linear_attention

from sana_jax.aot.topologies import open_topology
from sana_jax.aot.traffic import traffic
from sana_jax.models.attention import SelfAttention
from sana_jax.parallel.mesh import make_mesh

RESULT = pathlib.Path(__file__).resolve().parent / "results" / "kernel_bytes.json"
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


ROWS = attention_rows()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="text that a row's name contains")
    parser.add_argument("--print", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    if not any(arguments.only in name for name in ROWS):
        parser.error(f"--only={arguments.only}: in none of {'; '.join(ROWS)}")
    rows = read_rows()
    for name, row in ROWS.items():
        if arguments.print or name in rows or arguments.only not in name:
            continue
        print(name, flush=True)
        measured = measure(row)
        rows = read_rows() | {name: measured}  # another of these scripts may have written
        ordered = {key: rows[key] for key in ROWS if key in rows}
        RESULT.write_text(json.dumps(header() | {"rows": ordered}, indent=1) + "\n")
    print(table({key: rows[key] for key in ROWS if key in rows}))
    return 0


def read_rows() -> dict[str, dict]:
    """Name -> row of what was compiled so far."""
    return json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else {}


def header() -> dict:
    """What the numbers are."""
    return {"what": __doc__.split("\n\n")[0], "source": "XLA's TPU compiler; nothing was run on a device"}


def measure(row: Row) -> dict:
    """Bytes of the layer's programs, with XLA's form and with the kernel."""
    measured = {"versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}}
    shapes = jax.eval_shape(row.layer.init, jax.random.key(0), jnp.zeros(row.shape, jnp.bfloat16))
    mesh = make_mesh(1, 1, 1, devices=open_topology(row.topology).devices[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct(row.shape, jnp.bfloat16, sharding=place)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=place), shapes)
    for what, make, arguments in (("forward", forward, (params, x)), ("with backward", backward, (params, x, x))):
        compiled = functools.partial(compile_for, mesh, make, row.layer, arguments)
        with mock.patch.object(row.back_end, "refusal", return_value="it is measured without"):
            without = compiled()
        measured[what] = {"xla": account(without), "kernel": account(compiled())}
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
    """In Markdown, megabytes without and with the kernel."""
    lines = [
        "| layer | forward: HBM | XLA's count | with backward: HBM | XLA's count |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = []
        for what in ("forward", "with backward"):
            for count in ("hbm", "bytes accessed"):
                without, kernel = (row[what][form][count] for form in ("xla", "kernel"))
                cells.append(f"{without / 1e6:,.0f} → {kernel / 1e6:,.0f} MB ({kernel / without - 1:+.0%})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
