"""What layers, blocks and training steps move between an accelerator and its memory with the kernels of `kernels/` and without.

    python benchmarks/kernel_bytes.py               # compiles the rows that are not yet in the result, one after the other
    python benchmarks/kernel_bytes.py --only=v5e    # of these, the rows whose name contains a text
    python benchmarks/kernel_bytes.py --print       # the tables of what is there

By the compiled programs; nothing is run. Needs libtpu (`pip install -e '.[aot]'`) and no TPU; rows of an H100, `jax[cuda13]` in an
environment of its own, and no GPU. A layer takes a few minutes of one core, a block a quarter of an hour and a whole step almost
an hour; each is written to benchmarks/results/kernel_bytes.json at once (`compiled_rows`). Layers and blocks are compiled alone,
in bfloat16, forward and forward with backward.

For TPUs there are four forms: with XLA's operations or the kernels, and with q, k and v (value and gate) from one product that is
split or from a product each (`dense_parts` does that on TPUs). For an H100 there are XLA's operations and the kernels. Two counts are
given: the bytes of the memory (HBM), by `sana_jax.aot.traffic`, which leaves out what the compiler keeps on the chip between
operations; and XLA's own `bytes accessed`, which counts it, counts what a loop does once, and is not given for GPUs.
"""

import contextlib
import importlib
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
from sana_jax.kernels.glu_mbconv import api as mix_ffn
from sana_jax.kernels.glu_mbconv import pallas_tpu as gated_depthwise
from sana_jax.kernels.linear_attention import api as attention
from sana_jax.kernels.linear_attention import pallas_tpu as linear_attention
from sana_jax.kernels.multiscale import pallas_tpu as multiscale

from sana_jax.aot.compile import lower_step
from sana_jax.aot.topologies import Topology, open_topology
from sana_jax.aot.traffic import traffic
from sana_jax.models import presets
from sana_jax.models.attention import SelfAttention
from sana_jax.models.autoencoder_blocks import EfficientViTBlock, LiteMLA
from sana_jax.models.feed_forward import MixFFN
from sana_jax.models.transformer_block import TransformerBlock
from sana_jax.parallel.mesh import make_mesh

RESULT = ROOT / "benchmarks" / "results" / "kernel_bytes.json"
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "h100": "h100"}
PASSES = ("forward", "with backward")


def _without_kernels():
    for kernel in (linear_attention, gated_depthwise, multiscale):
        yield mock.patch.object(kernel, "refusal", return_value="it is measured without")


def _one_product():
    yield mock.patch.multiple(dense, _apart=dense._together, _apart_backward=dense._together_backward)


def _gpu_kernels():
    for api in (attention, mix_ffn):
        yield mock.patch.object(api, "choose", return_value="pallas_gpu")


# Name -> what is patched.
TPU_FORMS = {
    "XLA, one product": (_without_kernels, _one_product),
    "XLA, a product each": (_without_kernels,),
    "kernels, one product": (_one_product,),
    "kernels, a product each": (),
}
STEP_FORMS = {form: TPU_FORMS[form] for form in ("XLA, a product each", "kernels, a product each")}
H100_FORMS = {"XLA": (), "kernels": (_gpu_kernels,)}


class Layer(NamedTuple):
    """A module on one chip.

    Attributes:
      module: returns an array like the first that it is given.
      shapes: of what it is given, bfloat16.
      chip: of `TOPOLOGIES`.
      forms: by name.
    """

    module: nn.Module
    shapes: tuple[tuple[int, ...], ...]
    chip: str
    forms: dict


class Step(NamedTuple):
    """A whole training step on a pod.

    Attributes:
      config: the experiment, a file of configs/.
      topology: of the pod.
      forms: by name.
    """

    config: str
    topology: str
    forms: dict


class Block(nn.Module):
    """A transformer block that is given no mask: all tokens of the text are seen."""

    config: presets.TransformerConfig

    @nn.compact
    def __call__(self, x, text, modulation):
        return TransformerBlock(self.config)(x, text, jnp.ones(text.shape[:2], bool), modulation)[0]


def attention_rows() -> dict[str, Layer]:
    """Self-attention: projections to q, k and v, linear attention, output projection."""
    layers = (
        ("attention", (8, 1024, 2240), False, ("v5e", "v5p", "v6e", "h100")),
        ("attention with qk-norm", (8, 1024, 2240), True, ("v5e",)),
        ("attention", (1, 16384, 2240), False, ("v5e", "h100")),
        ("attention", (8, 1024, 1152), False, ("v5e", "h100")),
    )
    rows = {}
    for name, shape, qk_norm, chips in layers:
        layer = SelfAttention("linear", 32, qk_norm, 1e-15, clamp=False, dtype=jnp.bfloat16)
        for chip in chips:
            forms = H100_FORMS if chip == "h100" else TPU_FORMS
            rows[f"{name}, {shape[2]} wide, {shape[0]} x {shape[1]} tokens, {chip}"] = Layer(
                layer, (shape,), chip, forms
            )
    return rows


def mix_ffn_rows() -> dict[str, Layer]:
    """The Mix-FFN: expansion, gated depthwise convolution, projection."""
    layers = (
        ((8, 32, 32, 2240), ("v5e", "v5p", "v6e", "h100")),
        ((1, 128, 128, 2240), ("v5e", "h100")),
        ((8, 32, 32, 1152), ("v5e", "h100")),
    )
    rows = {}
    for shape, chips in layers:
        layer = MixFFN(shape[-1] * 5 // 2, jnp.bfloat16)
        for chip in chips:
            title = f"Mix-FFN, {shape[3]} wide, {shape[0]} x {shape[1]}x{shape[2]} tokens, {chip}"
            rows[title] = Layer(layer, (shape,), chip, H100_FORMS if chip == "h100" else TPU_FORMS)
    return rows


def block_rows() -> dict[str, Layer]:
    """A whole block of the 1.6B model, 300 tokens of text."""
    config, rows = presets.sana_1600m(32, dtype="bfloat16"), {}
    for batch, side, chips in ((8, 32, ("v5e", "v5p", "v6e", "h100")), (1, 128, ("v5e", "h100"))):
        shapes = (batch, side, side, config.width), (batch, 300, config.width), (batch, 6, config.width)
        for chip in chips:
            title = f"block, {config.width} wide, {batch} x {side}x{side} tokens, {chip}"
            rows[title] = Layer(Block(config), shapes, chip, H100_FORMS if chip == "h100" else TPU_FORMS)
    return rows


def autoencoder_rows() -> dict[str, Layer]:
    """Attention and a whole block of DC-AE f32c32, of the two finest grids that have them, for a picture of 1024 pixels."""
    rows = {}
    for side, width in ((128, 512), (64, 1024)):
        for name, module in (("attention", LiteMLA), ("block", EfficientViTBlock)):
            layer = module(scales=(5,), dtype=jnp.dtype("bfloat16"))
            title = f"DC-AE {name}, {width} wide, 1 x {side}x{side} positions, v5e"
            rows[title] = Layer(layer, ((1, side, side, width),), "v5e", TPU_FORMS)
    return rows


def step_rows() -> dict[str, Step]:
    """The step of `train.py --config=configs/sana_1600m_1024.py`: encoders, forward, backward, optimizer."""
    return {"training step, 1.6B at 1024, v5e:16x16": Step("sana_1600m_1024", "v5e:16x16", STEP_FORMS)}


ROWS = attention_rows() | mix_ffn_rows() | block_rows() | autoencoder_rows() | step_rows()


def main() -> int:
    return compiled_rows.run(__doc__.split("\n\n")[0], RESULT, ROWS, measure, tables)


def measure(row: Layer | Step) -> dict:
    """Bytes of the programs by form."""
    topology = open_topology(TOPOLOGIES[row.chip] if isinstance(row, Layer) else row.topology)
    measured = {"versions": versions("jax"), "compiler": topology.compiler}
    if isinstance(row, Step):
        sys.path.insert(0, str(ROOT))
        config = importlib.import_module(f"configs.{row.config}").get_config()
        return measured | {"with backward": _by_form(row.forms, lambda: lower_step(config, topology)[0], topology)}
    mesh = make_mesh(1, 1, 1, devices=topology.devices[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def abstract(shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    inputs = [abstract(shape) for shape in row.shapes]
    params = jax.eval_shape(row.module.init, jax.random.key(0), *(jnp.zeros(x.shape, x.dtype) for x in inputs))
    params = jax.tree.map(lambda leaf: abstract(leaf.shape), params)
    for name, make, arguments in zip(PASSES, (forward, backward), ((), inputs[:1]), strict=True):

        def lower(make=make, arguments=arguments):
            with jax.set_mesh(mesh):
                return jax.jit(make(row.module)).lower(params, *arguments, *inputs)

        measured[name] = _by_form(row.forms, lower, topology)
    return measured


def forward(module: nn.Module) -> Callable:
    return lambda params, *inputs: module.apply(params, *inputs)


def backward(module: nn.Module) -> Callable:
    def both(params, g, *inputs):
        y, vjp = jax.vjp(module.apply, params, *inputs)
        return y, vjp(g)

    return both


def _by_form(forms: dict, lower: Callable[[], jax.stages.Lowered], topology: Topology) -> dict[str, dict]:
    """Of each form both counts, and how many kernels the program calls."""
    found = {}
    for form, patches in forms.items():
        with contextlib.ExitStack() as patched:
            for patch in patches:
                for each in patch():
                    patched.enter_context(each)
            compiled = lower().compile(compiler_options=topology.options)
        text = compiled.as_text()
        found[form] = {
            "hbm": traffic(text),
            "bytes accessed": int((compiled.cost_analysis() or {}).get("bytes accessed", 0)) or None,
            "kernels": text.count("tpu_custom_call") + text.count("mosaic_gpu"),
        }
    return found


def tables(rows: dict[str, dict]) -> str:
    """In Markdown, megabytes, the forms of a row in their order."""
    on_gpu = {name: row for name, row in rows.items() if name.endswith("h100")}
    on_tpu = {name: row for name, row in rows.items() if name not in on_gpu}
    return f"{_table(on_tpu, ('hbm', 'bytes accessed'))}\n\n{_table(on_gpu, ('hbm',))}"


def _table(rows: dict[str, dict], counts: tuple[str, ...]) -> str:
    titles = [f"{name}{text}" for name in PASSES for text in (": HBM", ": XLA's count")[: len(counts)]]
    lines = [f"| layer | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, row in rows.items():
        cells = []
        for each in PASSES:
            forms = [counted for form, counted in row.get(each, {}).items() if form != "kernels, one product"]
            cells += [" / ".join(f"{counted[count] / 1e6:,.0f}" for counted in forms) for count in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
