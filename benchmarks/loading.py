"""How fast a transformer is read, and how much host memory that takes: seconds, GB/s, peak resident memory.

    python benchmarks/loading.py --preset=sana_600m --stored=bfloat16 --dtype=bfloat16

A model of the preset's shapes with random weights is written to a temporary folder, in shards of --shard_gb, and loaded
in a fresh process. On the CPU the parameters themselves are part of that process's memory; "besides" is the rest: peak, less
memory before loading, less parameters. The files have just been written, so that the disk is not measured unless the
page cache is too small (or emptied: --drop_caches, as root).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time


def write_random_model(config, folder: pathlib.Path, stored: str, shard_bytes: int) -> None:
    """A transformer's folder, one shard in memory at a time; tensors are slices of one random block of numbers."""
    import numpy as np
    from flax import traverse_util

    from sana_jax.models.transformer import SanaTransformer
    from sana_jax.weights import tensor_files
    from sana_jax.weights import transformer as weights
    from sana_jax.weights.parts import abstract_params

    shapes = {}
    abstract = traverse_util.flatten_dict(abstract_params(SanaTransformer(config)), sep="/")
    for entry in weights.entries(config):
        shapes |= entry.public_shapes(abstract[entry.path].shape)
    element = tensor_files.STORED_DTYPES[stored]
    shards, sizes = [{}], [0]
    for name, shape in shapes.items():
        nbytes = int(np.prod(shape)) * element.itemsize
        if sizes[-1] and sizes[-1] + nbytes > shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = shape
        sizes[-1] += nbytes
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    numbers = (0.02 * np.random.default_rng(0).standard_normal(largest, np.float32)).astype(element)
    stem, places = "diffusion_pytorch_model", {}
    for i, shard in enumerate(shards):
        file = folder / (
            f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        )
        places |= dict.fromkeys(shard, file.name)
        header = tensor_files.safetensors_header({name: (shape, element) for name, shape in shard.items()}, {})
        tensors = (memoryview(numbers[: int(np.prod(shape))].view(np.uint8)) for shape in shard.values())
        with file.open("wb") as stream:
            stream.write(header)
            stream.writelines(tensors)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
        tensor_files.write_json(folder / f"{stem}.safetensors.index.json", index)
    tensor_files.write_json(folder / "config.json", weights.config_to_json(config))


def resident(which: str) -> int:
    """VmRSS or VmHWM of this process in bytes; getrusage's peak would include the process that started this one."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def measure(folder: str, dtype: str, cache_dir: str | None, to_device: bool) -> None:
    """Loads the folder and prints what it took, as JSON; meant for a process of its own."""
    import jax

    import sana_jax
    from sana_jax.weights.parts import TRANSFORMER, abstract_params, find
    from sana_jax.weights.placement import default_device

    shapes = jax.tree.leaves(abstract_params(find(TRANSFORMER, folder).module))
    jax.numpy.zeros(1).block_until_ready()
    before = resident("VmRSS")
    start = time.perf_counter()
    _, params = sana_jax.load_transformer(
        folder, dtype, shardings=default_device if to_device else None, cache_dir=cache_dir
    )
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    on_host = 0 if to_device and jax.default_backend() != "cpu" else size
    stacked = max(x.size for x in shapes) * jax.numpy.dtype(dtype).itemsize
    facts = dict(seconds=seconds, parameters=size, peak=peak, besides=peak - before - on_host, stacked=stacked)
    print(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="sana_600m", help="function of sana_jax.models.presets")
    parser.add_argument("--stored", default="bfloat16", help="dtype on disk")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the loaded parameters")
    parser.add_argument("--shard_gb", type=float, default=5.0)
    parser.add_argument("--host", action="store_true", help="load into NumPy arrays, not onto the default device")
    parser.add_argument("--cache", action="store_true", help="load a second and third time, through cache_dir")
    parser.add_argument("--drop_caches", action="store_true", help="empty the page cache before each load (root)")
    parser.add_argument("--folder", help="where to write; a temporary folder if left out")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--cache_dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.dtype, args.cache_dir, not args.host)
        return

    from sana_jax.models import presets

    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        folder = pathlib.Path(root) / "model"
        folder.mkdir()
        write_random_model(getattr(presets, args.preset)(), folder, args.stored, int(args.shard_gb * 1e9))
        sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
        print(
            f"{args.preset}, {args.stored}: {sum(sizes) / 1e9:.2f} GB in {len(sizes)} files, largest {max(sizes) / 1e9:.2f} GB"
        )
        rounds = [("load", [])]
        if args.cache:
            cached = [f"--cache_dir={root}/cache"]
            rounds += [("load, writing the cache", cached), ("load from the cache", cached)]
        for what, more in rounds:
            if args.drop_caches:
                pathlib.Path("/proc/sys/vm/drop_caches").write_text("1")
            command = [sys.executable, __file__, f"--measure={folder}", f"--dtype={args.dtype}", *more]
            command += ["--host"] if args.host else []
            facts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(
                f"{what} as {args.dtype}: {facts['seconds']:.2f} s, {sum(sizes) / 1e9 / facts['seconds']:.2f} GB/s from disk; "
                f"peak {facts['peak'] / 1e9:.2f} GB resident, {facts['besides'] / 1e9:.2f} GB besides "
                f"{facts['parameters'] / 1e9:.2f} GB of parameters (largest stacked: {facts['stacked'] / 1e9:.2f} GB)"
            )


if __name__ == "__main__":
    main()
