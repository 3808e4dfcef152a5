"""Latency of one 4096x4096 picture of SANA-1.6B with its rows split over TPU chips, as XLA's TPU compiler counts it.

    python benchmarks/sampling_devices.py               # seq = 1, 4 and 16 chips of v5p; ten minutes of one core each
    python benchmarks/sampling_devices.py --seq 4       # one of them
    python benchmarks/sampling_devices.py --tiny        # a model of toy size, to try the script; writes no file

Compiles the pipeline's own program (`sampling.program.draw`), from token ids to pixels, ahead of time for abstract
arrays: bfloat16, 20 steps, guidance in one pass, 300 text tokens without an instruction before them. Needs libtpu and no
TPU. Nothing is run: memory is the compiler's count, latency a bound from published peaks (`sana_jax/aot/report.py`), and
no figure is a measurement. Writes benchmarks/results/sampling_devices.json after every row; each row has its commit.
"""

import argparse
import functools
import sys

import compiled_rows
from provenance import ROOT, commit

RESULT = ROOT / "benchmarks" / "results" / "sampling_devices.json"
TOPOLOGIES = {1: "v5p:2x2x1", 4: "v5p:2x2x1", 16: "v5p:2x2x4"}  # chips of seq -> the smallest that has them
STEPS, FLOW_SHIFT, TEXT_LENGTH = 20, 6.0, 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seq", type=int, nargs="+", choices=tuple(TOPOLOGIES), default=list(TOPOLOGIES), help="chips")
    parser.add_argument("--tiny", action="store_true", help="a model of toy size; writes no file")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))

    rows = {} if arguments.tiny else compiled_rows.read(RESULT)
    for seq in arguments.seq:
        report = compile_sampler(seq, tiny=arguments.tiny)
        print(report, flush=True)
        rows[str(seq)] = {"commit": commit()} | report.to_json()
        if not arguments.tiny:
            compiled_rows.write(__doc__.split("\n\n")[0], RESULT, {str(seq): None for seq in TOPOLOGIES}, rows)
    print(table(rows))
    return 0


def compile_sampler(seq: int, *, tiny: bool):
    """The `Report` of one picture, its "step" being the whole trajectory."""
    import jax
    import jax.numpy as jnp

    from sana_jax import flops
    from sana_jax.aot.compile import compile_lowered, count
    from sana_jax.aot.topologies import open_topology
    from sana_jax.parallel import sharding
    from sana_jax.parallel.mesh import make_mesh
    from sana_jax.sampling import devices, program
    from sana_jax.sampling.plan import plan_sampling
    from sana_jax.weights.folder import SamplingDefaults, abstract_params

    topology = open_topology(TOPOLOGIES[seq])
    mesh = make_mesh(data=1, seq=seq, devices=topology.devices[:seq])
    modules, side = make_modules(tiny)
    transformer, autoencoder, text_encoder = (module.config for module in modules)
    grid = side // autoencoder.downsample_factor

    def bfloat16(x):
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)

    params = {name: jax.tree.map(bfloat16, abstract_params(module)) for name, module in modules._asdict().items()}
    tokens = jax.ShapeDtypeStruct((1, TEXT_LENGTH), jnp.int32)
    null = jax.ShapeDtypeStruct((1, TEXT_LENGTH, text_encoder.hidden_size), jnp.bfloat16)
    inputs = program.Inputs(
        text=program.Text(tokens, tokens, None),
        null=program.Features(null, tokens),
        noise=jax.ShapeDtypeStruct((1, grid, grid, transformer.in_channels), jnp.float32),
        guidance_scale=jax.ShapeDtypeStruct((), jnp.float32),
        interval=None,
        pag=None,
        image=None,
        step_noise=None,
    )
    call = plan_sampling(
        modules,
        SamplingDefaults(num_inference_steps=STEPS, flow_shift=FLOW_SHIFT, max_sequence_length=TEXT_LENGTH),
        size=(side, side),
        generated=(side, side),
        guidance_scale=4.5,
        rows_are_split=seq > 1,
    )
    devices.check_call(mesh, transformer, 1, grid, call)
    places = devices.input_shardings(inputs, mesh)
    inputs = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), inputs, places)
    draw = jax.jit(functools.partial(program.draw, modules), static_argnames="sampling")
    with jax.set_mesh(mesh):
        lowered = draw.lower(sharding.placed(params, mesh), inputs, sampling=call)
    operations = 2 * STEPS * flops.transformer_flops(transformer, grid, grid, TEXT_LENGTH)
    operations += flops.text_encoder_flops(text_encoder, TEXT_LENGTH)
    operations += flops.decoder_flops(autoencoder, side, side)
    known = dict(batch_size=1, parameters=0, frozen_parameters=count(params), step_flops=operations)
    return compile_lowered(lowered, topology, mesh, **known)


def make_modules(tiny: bool):
    """The modules, and the side of the picture in pixels."""
    from sana_jax.models import presets
    from sana_jax.models.autoencoder import Autoencoder
    from sana_jax.models.text_encoder import TextEncoder
    from sana_jax.models.transformer import SanaTransformer
    from sana_jax.sampling.program import Modules

    dtype = dict(dtype="bfloat16")
    transformer, autoencoder, text = dict(sample_size=128, **dtype), dtype, presets.gemma2_2b(**dtype)
    if tiny:
        text = presets.gemma2_tiny(**dtype)
        transformer |= dict(width=256, num_layers=2, num_cross_attention_heads=4, caption_channels=text.hidden_size)
        widths = (32, 32, 64, 64, 128, 128)
        autoencoder |= dict(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
        counts = (1,) * len(widths)
        autoencoder |= dict(encoder_layers_per_block=counts, decoder_layers_per_block=counts)
    modules = Modules(
        SanaTransformer(presets.sana_1600m(**transformer)),
        Autoencoder(presets.dc_ae_f32c32_sana_1_1(**autoencoder)),
        TextEncoder(text),
    )
    return modules, 1024 if tiny else 4096


def table(rows: dict[str, dict]) -> str:
    """The rows as Markdown."""
    titles = ("chips (seq)", "memory a chip, GB", "sent a chip, GB: all-reduce / permute")
    titles += ("compute / memory / interconnect, s", "latency at least, s")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for seq, row in rows.items():
        if not row["memory"]:
            lines.append(f"| {seq} of {row['topology']} | does not fit | | | |")
            continue
        memory, bounds = row["memory"], row["bound_seconds"]
        sent = [row["collectives"].get(kind, {"sent": 0})["sent"] for kind in ("all-reduce", "collective-permute")]
        lines.append(
            f"| {seq} of {row['topology']} | {memory['peak'] / 1e9:.1f} of {memory['hbm'] / 1e9:.0f} | "
            + " / ".join(f"{value / 1e9:.3f}" for value in sent)
            + " | "
            + " / ".join(f"{bounds[name]:.3f}" for name in ("compute", "memory", "interconnect"))
            + f" | {row['step_seconds']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
