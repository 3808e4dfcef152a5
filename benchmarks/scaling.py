"""Time and memory of the transformer from 512 to 4096 pixels, with linear attention and with softmax attention.

    python benchmarks/scaling.py               # all sizes, 10 minutes on 2 cores; leave the machine alone meanwhile
    python benchmarks/scaling.py --tiny        # a narrow model up to 1024 pixels, to try the script; writes nothing
    python benchmarks/scaling.py --print       # the table of what is there
    python benchmarks/scaling.py --plot        # results/scaling.png of what is there; pip install matplotlib

Two blocks of SANA 0.6B, one picture, 300 text tokens; the twin differs in its self-attention only. Measured are the median of
three calls and, by the compiler, the memory of temporaries. An exponent is the slope of a straight line through the
logarithms, by least squares: 1 is linear in the number of tokens, 2 quadratic. On a CPU softmax attention goes block by block, so
that its memory is linear too. Results go to benchmarks/results/scaling.json size by size.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time

from provenance import ROOT, commit, machine, versions

RESULT = ROOT / "benchmarks" / "results" / "scaling.json"
PLOT = RESULT.with_suffix(".png")
SIDES = (512, 1024, 1536, 2048, 3072, 4096)
KINDS = ("linear", "softmax")
LAYERS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a narrow model, to try the script")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    parser.add_argument("--plot", action="store_true", help="draw what was measured")
    arguments = parser.parse_args()
    if arguments.print or arguments.plot:
        rows = json.loads(RESULT.read_text())["rows"]
    else:
        rows = measure_all(arguments)
    if arguments.plot:
        plot(rows)
    print(table(rows))
    return 0


def measure_all(arguments: argparse.Namespace) -> list[dict]:
    from sana_jax.models import presets

    config = presets.sana_600m(num_layers=LAYERS)
    if arguments.tiny:
        config = dataclasses.replace(config, width=224, num_cross_attention_heads=7)
    rows = []
    for kind in KINDS:
        for side in SIDES[:2] if arguments.tiny else SIDES:
            rows.append(measure(dataclasses.replace(config, self_attention=kind), side))
            print(rows[-1], file=sys.stderr, flush=True)
            if not arguments.tiny:
                about = {"what": __doc__.split("\n\n")[0], "commit": commit(), "machine": machine()}
                RESULT.write_text(json.dumps(about | {"versions": versions("jax"), "rows": rows}, indent=1) + "\n")
    return rows


def measure(config, side: int) -> dict:
    """Seconds of one evaluation, and bytes of temporaries."""
    import jax
    import jax.numpy as jnp

    from sana_jax.compiler_options import compiler_options
    from sana_jax.models.transformer import SanaTransformer

    module, rows = SanaTransformer(config), side // 32
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = (
        jax.random.normal(keys[0], (1, rows, rows, config.in_channels)),
        jnp.full(1, 500.0),
        jax.random.normal(keys[1], (1, 300, config.caption_channels)),
        jnp.ones((1, 300), jnp.int32),
    )
    shapes = jax.eval_shape(module.init, keys[2], *inputs)["params"]
    params = jax.tree.map(lambda x: 0.02 * jax.random.normal(keys[3], x.shape), shapes)
    options = compiler_options(jax.default_backend())
    evaluate = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs), compiler_options=options)
    run = evaluate.lower(params, *inputs).compile()
    run(params, *inputs).block_until_ready()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run(params, *inputs).block_until_ready()
        times.append(time.perf_counter() - began)
    return {
        "attention": config.self_attention,
        "side": side,
        "tokens": rows**2,
        "seconds": statistics.median(times),
        "all seconds": times,
        "temporaries": run.memory_analysis().temp_size_in_bytes,
    }


def exponent(rows: list[dict], what: str) -> float:
    """Slope of the logarithm of what was measured over that of the number of tokens."""
    import numpy as np

    tokens, values = (np.log([row[name] for row in rows]) for name in ("tokens", what))
    return float(np.polyfit(tokens, values, 1)[0])


def table(rows: list[dict]) -> str:
    """In Markdown, with the exponents of each kind in its last line."""
    lines = ["| pixels | tokens | linear: s | GB | softmax: s | GB |", "|---|---|---|---|---|---|"]
    by_kind = {kind: [row for row in rows if row["attention"] == kind] for kind in KINDS}
    for side in sorted({row["side"] for row in rows}):
        cells = []
        for kind in KINDS:
            found = [row for row in by_kind[kind] if row["side"] == side]  # none, where the run was ended before
            cells += [f"{found[0]['seconds']:.2f}", f"{found[0]['temporaries'] / 1e9:.2f}"] if found else ["", ""]
        lines.append(f"| {side} | {(side // 32) ** 2:,} | {' | '.join(cells)} |")
    slopes = [f"{exponent(by_kind[kind], what):.2f}" for kind in KINDS for what in ("seconds", "temporaries")]
    lines.append(f"| exponent | | {' | '.join(slopes)} |")
    return "\n".join(lines)


def plot(rows: list[dict]) -> None:
    """Time against resolution, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=120)
    for kind, marker in zip(KINDS, "os", strict=True):
        of_kind = [row for row in rows if row["attention"] == kind]
        label = f"{kind} attention: tokens$^{{{exponent(of_kind, 'seconds'):.2f}}}$"
        axes.plot([row["side"] for row in of_kind], [row["seconds"] for row in of_kind], marker=marker, label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="side of the picture, pixels", ylabel="seconds, two blocks of SANA 0.6B"
    )
    axes.set_xticks(SIDES, [str(side) for side in SIDES])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(PLOT)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
