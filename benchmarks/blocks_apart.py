"""A transformer with its blocks scanned, and with its blocks apart as the sampler has them (`sana_jax.models.layers`).

    python benchmarks/blocks_apart.py            # seconds of an evaluation of 0.6B at 512 here, called in turn
    python benchmarks/blocks_apart.py --tiny     # a narrow model, to try the script
    python benchmarks/blocks_apart.py --aot      # 1.6B at 1024 compiled for an H100, nothing run: bytes of slices copied

`--aot` needs `jax[cuda13]` in an environment of its own and no GPU. Prints JSON.
"""

import argparse
import dataclasses
import json
import math
import re
import statistics
import sys
import time

from provenance import ROOT, commit, machine, versions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a narrow model, to try the script")
    parser.add_argument("--aot", action="store_true", help="compile for an H100")
    arguments = parser.parse_args()
    rows = compile_both() if arguments.aot else time_both(arguments.tiny)
    print(json.dumps({"commit": commit(), "machine": machine(), "versions": versions("jax")} | rows, indent=1))
    return 0


def time_both(tiny: bool, repeats: int = 5) -> dict:
    import jax

    from sana_jax.compiler_options import compiler_options
    from sana_jax.models import layers, presets

    config = presets.sana_600m(16)
    if tiny:
        config = dataclasses.replace(config, width=224, num_layers=3, num_cross_attention_heads=7)
    apply, shapes, inputs = model(config)
    params = jax.tree.map(lambda x: 0.02 * jax.random.normal(jax.random.key(0), x.shape, x.dtype), shapes)
    inputs = [jax.numpy.ones(x.shape, x.dtype) for x in inputs]
    forms = {"scanned": params, "apart": layers.take_apart(dict(params))}
    programs, seconds = {}, {form: [] for form in forms}
    options = compiler_options(jax.default_backend())
    rows = {"config": f"{config.num_layers} blocks, {config.width} wide, {config.sample_size * 32} pixels, batch 2"}
    for form, given in forms.items():
        began = time.perf_counter()
        programs[form] = jax.jit(apply).lower(given, *inputs).compile(compiler_options=options)
        rows[f"{form}: compilation"] = time.perf_counter() - began
        programs[form](given, *inputs).block_until_ready()
    for _ in range(repeats):
        for form, given in forms.items():
            began = time.perf_counter()
            programs[form](given, *inputs).block_until_ready()
            seconds[form].append(time.perf_counter() - began)
    rows |= {f"{form}: seconds": statistics.median(times) for form, times in seconds.items()}
    return rows | {"apart / scanned": rows["apart: seconds"] / rows["scanned: seconds"]}


def compile_both() -> dict:
    import jax

    from sana_jax.aot.topologies import open_topology
    from sana_jax.models import layers, presets
    from sana_jax.parallel.mesh import make_mesh

    topology = open_topology("h100")
    mesh = make_mesh(1, 1, 1, devices=topology.devices[:1])
    config = presets.sana_1600m(32, dtype="bfloat16")
    apply, shapes, inputs = model(config)
    forms = {"scanned": shapes, "apart": jax.eval_shape(lambda params: layers.take_apart(dict(params)), shapes)}
    rows = {"config": "1.6B at 1024, bfloat16, batch 2, H100"}
    for form, given in forms.items():
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        arguments = jax.tree.map(
            lambda x, place=place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (given, *inputs)
        )
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            compiled = jax.jit(apply).lower(*arguments).compile(compiler_options=topology.options)
        rows[f"{form}: compilation"] = time.perf_counter() - began
        copied = copied_slices(compiled.as_text()) * (config.num_layers if form == "scanned" else 1)
        rows[f"{form}: bytes of slices copied"] = copied
    return rows


def model(config):
    """(function of parameters and inputs, shapes of the parameters, shapes of the inputs): a guided evaluation."""
    import jax
    import jax.numpy as jnp

    from sana_jax.models.transformer import SanaTransformer

    module, side, dtype = SanaTransformer(config), config.sample_size, jnp.dtype(config.dtype)
    inputs = [
        jax.ShapeDtypeStruct((2, side, side, config.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.float32),
        jax.ShapeDtypeStruct((2, 300, config.caption_channels), dtype),
        jax.ShapeDtypeStruct((2, 300), jnp.int32),
    ]
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return lambda params, *inputs: module.apply({"params": params}, *inputs), shapes, inputs


def copied_slices(program: str) -> int:
    """Bytes that operations which only cut a slice out of an array write, each counted once."""
    sizes = re.findall(r"= bf16\[([\d,]+)\]\S* fusion\([^)]*\), kind=kCustom, calls=%?fused_dynamic_slice", program)
    return sum(2 * math.prod(map(int, size.split(","))) for size in sizes)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
