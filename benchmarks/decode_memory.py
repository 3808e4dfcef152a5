"""Memory of decoding with DC-AE sana-1.1 in bfloat16: plain, in strips and over four devices, as the compiler counts it.

    python benchmarks/decode_memory.py                    # XLA's CPU compiler
    python benchmarks/decode_memory.py --platform=tpu     # XLA's TPU compiler, for v5p; needs libtpu, but no TPU

Compiles ahead of time for abstract arrays and reads `memory_analysis()`: nothing is allocated or run, and no figure is a
measurement on a device. Per device: arguments (weights and latents), result and temporaries; their sum is what must fit.
Parameters are bfloat16, one picture. The CPU compiler computes convolutions of bfloat16 in float32 and keeps copies
that an accelerator does not need. Writes benchmarks/results/decode_memory_PLATFORM.json after every row, in place of that
row alone where the rest of the file is of the same compiler; each row has its commit.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
import time

from provenance import ROOT, commit, machine, versions

DEVICES = 4
STRIP_ROWS = 256  # of the picture
TOPOLOGY = "v5p:2x2x1"  # four chips
GB = 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--platform", choices=("cpu", "tpu"), default="cpu")
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 2048, 4096], help="pixels")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    os.environ["XLA_FLAGS"] = flags.strip()
    # libtpu asks the cloud's metadata server otherwise, and lets only one process of a machine load it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    sys.path.insert(0, str(ROOT))

    import jax

    devices = jax.devices()
    if arguments.platform == "tpu":
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices
    report = {
        "what": __doc__.split("\n\n")[0],
        "source": f"memory_analysis() of XLA's {arguments.platform} compiler; nothing was run",
        "target": f"{TOPOLOGY}, libtpu {versions('libtpu')['libtpu']}" if arguments.platform == "tpu" else "cpu",
        "host": machine(),
        "versions": versions("jax", "jaxlib", "flax"),
    }
    file = ROOT / "benchmarks" / "results" / f"decode_memory_{arguments.platform}.json"
    file.parent.mkdir(exist_ok=True)
    rows = _earlier_rows(file, report)
    print(f"{report['source']}\n{'':26} arguments   result  temporary     sum, GB per device")
    for side in arguments.sides:
        for method in arguments.methods:
            row = compile_decode(method, side, devices) | {"commit": commit()}
            rows[row["method"], side] = row
            file.write_text(json.dumps(report | {"rows": list(rows.values())}, indent=1) + "\n")
            if "error" in row:
                print(f"{side}x{side} {row['method']}: {row['error']}", flush=True)
                continue
            parts = [row[name] / GB for name in ("argument_bytes", "output_bytes", "temporary_bytes", "sum_bytes")]
            title = f"{side}x{side} {row['method']}"
            print(f"{title:26} {parts[0]:9.2f} {parts[1]:8.2f} {parts[2]:10.2f} {parts[3]:7.2f}", flush=True)
    return 0


def compile_decode(method: str, side: int, devices: list) -> dict:
    """Compiles one decode of a side x side picture and reads what it needs, bytes per device."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from sana_jax.models import presets
    from sana_jax.models.autoencoder import Autoencoder
    from sana_jax.parallel.mesh import make_mesh

    config = presets.dc_ae_f32c32_sana_1_1(dtype="bfloat16")
    module = Autoencoder(config)
    mesh = make_mesh(
        seq=DEVICES if method == "sharded" else 1, devices=devices[: DEVICES if method == "sharded" else 1]
    )

    def abstract(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]["decoder"]
    params = {"decoder": jax.tree.map(lambda x: abstract(x.shape, jnp.bfloat16), shapes)}
    grid = side // config.downsample_factor
    latents = abstract((1, grid, grid, config.latent_channels), jnp.float32, None, "seq")
    decode, name = METHODS[method](module, mesh, side)
    start = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            compiled = jax.jit(decode).lower(params, latents).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # The TPU compiler refuses a program that its chip cannot hold.
        return {"method": name, "side": side, "devices": mesh.size, "error": str(error).strip().splitlines()[0]}
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    row = {
        "method": name,
        "side": side,
        "devices": mesh.size,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }
    return row | {"sum_bytes": sum(row[f"{part}_bytes"] for part in ("argument", "output", "temporary"))}


def _plain(module, mesh, side):
    return lambda params, latents: module.apply({"params": params}, latents, method="decode"), "plain"


def _strips(module, mesh, side):
    from sana_jax.models.autoencoder_strips import decode_in_strips

    strips = side // STRIP_ROWS
    return functools.partial(decode_in_strips, module, strips=strips), f"{strips} strips"


def _sharded(module, mesh, side):
    from sana_jax.parallel.autoencoder import apply_autoencoder

    return functools.partial(apply_autoencoder, module, method="decode"), f"{mesh.size} devices"


METHODS = {"plain": _plain, "strips": _strips, "sharded": _sharded}


def _earlier_rows(file: pathlib.Path, report: dict) -> dict[tuple[str, int], dict]:
    """(method, side) -> row of an earlier run with the same compiler."""
    earlier = json.loads(file.read_text()) if file.is_file() else {}
    same = all(earlier.get(key) == report[key] for key in ("source", "target", "versions"))
    return {(row["method"], row["side"]): row for row in earlier["rows"]} if same else {}


if __name__ == "__main__":
    sys.exit(main())
