"""Optimizers with their state in float32 and in eight bits on the same training run: losses and bytes side by side.

    python -m benchmarks.optimizers_8bit [--steps=400] [--optimizers came came8bit ...]

The embedded model's config made smaller (three blocks of width 160, a text encoder of one layer), trained on 512
emoji: the same pictures, captions, noise and noise levels in every run. Curves are means over the 50 steps before;
"gap" is the largest distance of an eight-bit run's curve from its float32 run's, relative to the latter. Writes
benchmarks/results/optimizers_8bit.json.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import shutil
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
WINDOW = 50
# name -> (betas, learning rate)
OPTIMIZERS = {
    "came": ((0.9, 0.999, 0.9999), 5e-4),
    "came8bit": ((0.9, 0.999, 0.9999), 5e-4),
    "adamw": ((0.9, 0.999), 1e-3),
    "adamw8bit": ((0.9, 0.999), 1e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--optimizers", nargs="+", choices=tuple(OPTIMIZERS), default=list(OPTIMIZERS))
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        pictures = pathlib.Path(folder) / "pictures"
        write_pictures(pictures, 512)
        for name in arguments.optimizers:
            runs[name] = train(name, arguments.steps, pictures, pathlib.Path(folder))
            print(f"{name}: {runs[name]['seconds']:.0f} s", flush=True)
    report = {
        "what": __doc__.split("\n\n")[0],
        "host": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "steps": arguments.steps,
        "parameters": next(iter(runs.values())).pop("parameters"),
        "rows": [row(name, runs) for name in runs],
        "curves": {
            name: {"first_step": WINDOW, "every": 10, "loss": [round(x, 5) for x in smoothed(run["losses"])[::10]]}
            for name, run in runs.items()
        },
    }
    file = ROOT / "benchmarks" / "results" / "optimizers_8bit.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'':10} final loss       gap   state, MB")
    for line in report["rows"]:
        gap = f"{line['gap']:.2%}" if "gap" in line else ""
        print(f"{line['optimizer']:10} {line['loss']:10.4f} {gap:>9} {line['state_bytes'] / 1e6:11.2f}")


def write_pictures(path: pathlib.Path, count: int) -> None:
    """A data set of the first `count` embedded emoji."""
    from sana_jax.data import picture_set, records

    found = (record for _, record in records.read_dataset(picture_set.embedded_path()))
    records.write_dataset(path, itertools.islice(found, count), {"name": "emoji, in part"})


def train(name: str, steps: int, pictures: pathlib.Path, folder: pathlib.Path) -> dict:
    """Trains with one optimizer; what runs have in common (latents, tokenizer) is taken from the first."""
    import jax

    from configs import emoji
    from sana_jax.training import loop

    config = emoji.get_config()
    config.model.width, config.model.num_layers, config.model.unroll = 160, 3, 3
    config.text_encoder.model.num_layers = config.text_encoder.model.unroll = 1
    config.data.path, config.data.split, config.data.batch_size = str(pictures), "all", 32
    config.sample.split, config.sample.num_images = "all", 8
    config.train.cache_latents = True
    config.train.num_steps = config.train.checkpoint_every = steps
    config.train.log_every, config.train.sample_every = 1, 0
    config.optimizer.name = name
    config.optimizer.betas, config.optimizer.learning_rate = OPTIMIZERS[name]
    config.optimizer.schedule, config.optimizer.warmup_steps = "constant", 50
    config.ema.decay = 0.0
    workdir, common = folder / name, folder / "common"
    if common.is_dir():
        shutil.copytree(common, workdir)
    start = time.perf_counter()
    state = loop.train(config, str(workdir))
    seconds = time.perf_counter() - start
    for part in ("latents", "tokenizer"):
        shutil.copytree(workdir / part, common / part, dirs_exist_ok=True)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "seconds": seconds,
    }


def row(name: str, runs: dict) -> dict:
    """A line of the table."""
    curve = smoothed(runs[name]["losses"])
    line = {"optimizer": name, "loss": round(curve[-1], 5), "state_bytes": runs[name]["state_bytes"]}
    if name.endswith("8bit") and (exact := runs.get(name.removesuffix("8bit"))):
        line["gap"] = round(max(abs(a - b) / b for a, b in zip(curve, smoothed(exact["losses"]), strict=True)), 5)
    return line


def smoothed(losses: list[float]) -> list[float]:
    """Means over WINDOW steps, the first of them ending at step WINDOW."""
    return [sum(losses[end - WINDOW : end]) / WINDOW for end in range(WINDOW, len(losses) + 1)]


if __name__ == "__main__":
    main()
