"""Everything that waits for a GPU: what a session that is lent one runs at once.

    python benchmarks/gpu_session.py pictures --out=DIR   # prompt to pixels beside diffusers, see gpu_pictures.py
    python benchmarks/gpu_session.py layers --out=DIR     # layers and a training step beside PyTorch, see gpu_layers.py
    python benchmarks/gpu_session.py time --out=DIR       # public sizes, random weights: forward, decode, step, picture
    python benchmarks/gpu_session.py check --out=DIR      # the tests marked `gpu`
    python benchmarks/gpu_session.py train --out=DIR --minutes=8 --config=configs/emoji_autoencoder_128.py
    python benchmarks/gpu_session.py train --out=DIR --minutes=8 --config=configs/emoji_128.py --from_parts=DIR2

The parts stand in the order of their worth; each is one command, for which ten minutes are enough, all of them 25. `--tiny` shrinks
every model, so that the whole script can be tried on a CPU first. Each part writes DIR/PART.json with device, versions and
commit, after every measurement, so that what was measured before a time limit is kept.

A machine without a network is given wheels of what it lacks: here `pip download --only-binary=:all: --python-version=3.12 -d .whl
grain array_record ml_collections diffusers ...`, there `pip install --no-index --find-links=.whl ...`.

A training leg ends by itself before `--minutes` and leaves DIR/export.tar.partN of at most 15 MiB, the averaged weights in
diffusers layout with config and metrics; `--from_parts` names the folder of an earlier leg's parts to go on from, whose
weights start this leg (`init_from`), or whose autoencoder it uses.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tarfile
import time

import gpu_layers
import gpu_pictures

ROOT = pathlib.Path(__file__).resolve().parents[1]
PART_BYTES = 15 * 2**20
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("part", choices=("pictures", "layers", "time", "check", "train"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script on a CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="of a training leg, compilation and saving included")
    parser.add_argument("--config", default="configs/emoji_128.py", help="of a training leg")
    parser.add_argument("--from_parts", type=pathlib.Path, help="folder with an earlier leg's export.tar.part*")
    parser.add_argument("overrides", nargs="*", help="of a training leg, after --: --config.FIELD=VALUE")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the tests and train.py run beside this process
    report = Report(arguments.out / f"{arguments.part}.json")
    parts = {"pictures": pictures, "layers": layers, "time": measure, "check": check, "train": train}
    return parts[arguments.part](arguments, report)


class Report:
    """Rows of results, written to a JSON file whenever one is added."""

    def __init__(self, file: pathlib.Path):
        import jax

        self._file = file
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        self._content = {
            "command": " ".join(["python", *sys.argv]),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "commit": commit or "no repository",
            "rows": [],
        }

    def add(self, **row):
        self._content["rows"].append(row)
        self._file.write_text(json.dumps(self._content, indent=1) + "\n")
        print(json.dumps(row), flush=True)


# Check


def check(arguments, report) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider"]
    began = time.perf_counter()
    environment = os.environ | {"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": ""}  # in place of what tests/conftest.py sets
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(run.stdout[-6000:], run.stderr[-2000:])
    last = (run.stdout.strip().splitlines() or ["nothing printed"])[-1]
    report.add(name="pytest -m gpu", exit_code=run.returncode, summary=last, seconds=time.perf_counter() - began)
    return run.returncode


# Beside PyTorch


def pictures(arguments, report) -> int:
    return in_turn(gpu_pictures, arguments.tiny, report)


def layers(arguments, report) -> int:
    return in_turn(gpu_layers, arguments.tiny, report)


def in_turn(module, tiny: bool, report) -> int:
    """The peer, ours, the peer again: what changes between its two turns is the machine's doing."""
    peer = importlib.util.find_spec("diffusers") is not None and importlib.util.find_spec("torch") is not None
    if not peer:
        report.add(name="diffusers", error="torch or diffusers is not installed: no peer")
    for turn in ("peer", "ours", "peer"):
        if turn == "ours":
            module.measure_ours(report, tiny)
        elif peer:
            gpu_pictures.measure_peers(report, tiny, module.__file__)
    return 0


# Time


def measure(arguments, report) -> int:
    """The machine's ceilings first, then what a user waits for."""
    import jax
    import jax.numpy as jnp

    from sana_jax.models import presets

    side = 512 if arguments.tiny else 8192
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    seconds, _ = timed(jax.jit(lambda x: x @ x), a)
    report.add(name=f"matrix product {side}, bf16", seconds=seconds, tflops=2 * side**3 / seconds / 1e12)
    seconds, _ = timed(jax.jit(lambda x: x + 1), a)
    report.add(name="read and write, bf16", seconds=seconds, gigabytes_per_second=4 * side**2 / seconds / 1e9)

    sizes = [(presets.sana_600m(16), 512), (presets.sana_600m(32), 1024), (presets.sana_1600m(32), 1024)]
    for config, pixels in sizes:
        shrunk = {"num_layers": 2, "width": 224, "num_cross_attention_heads": 7} if arguments.tiny else {}
        config = dataclasses.replace(config, dtype="bfloat16", **shrunk)
        guarded(report, f"transformer {pixels}", functools.partial(measure_transformer, config, pixels, report))
    for pixels in (512, 1024):
        guarded(report, f"DC-AE {pixels}", functools.partial(measure_autoencoder, pixels, arguments.tiny, report))
    config = dataclasses.replace(sizes[0][0], dtype="bfloat16", remat="minimal", **shrunk)
    guarded(report, "training step", functools.partial(measure_step, config, 4 if arguments.tiny else 64, report))
    return 0


def guarded(report, name, run):
    """One measurement that fails (memory, a compiler's bug) must not cost the session the others."""
    try:
        run()
    except Exception as error:  # noqa: BLE001 - reported as the result
        report.add(name=name, error=f"{type(error).__name__}: {error}"[:2000])


def measure_transformer(config, pixels, report):
    """One guided evaluation (batch 2, 300 text tokens), and a trajectory of 20 Flow-DPM steps."""
    import jax
    import jax.numpy as jnp

    from sana_jax.diffusion import guidance, solvers
    from sana_jax.models.transformer import SanaTransformer

    module, side = SanaTransformer(config), pixels // 32
    latents, text = random_inputs(config, 2, side)
    params = random_parameters(module, latents, jnp.zeros(2), *text)
    count = sum(x.size for x in jax.tree.leaves(params))
    name = f"transformer {count / 1e6:,.0f}M at {pixels}, bf16"
    forward = jax.jit(lambda params, x, *text: module.apply({"params": params}, x, jnp.full(2, 500.0), *text))
    seconds, compilation = timed(forward, params, latents, *text)
    report.add(name=f"{name}: forward, batch 2", seconds=seconds, compilation_seconds=compilation)

    @jax.jit
    def draw(params, noise, features, mask):
        velocity = guidance.classifier_free_guidance(
            lambda x, t, condition: module.apply({"params": params}, x, t, *condition),
            (features[:1], mask[:1]),
            (features[1:], mask[1:]),
            4.5,
        )
        return solvers.sample(velocity, noise, solvers.flow_dpm(20, 3.0))

    seconds, compilation = timed(draw, params, latents[:1], *text)
    report.add(name=f"{name}: 20 guided steps, one picture", seconds=seconds, compilation_seconds=compilation)


def measure_autoencoder(pixels, tiny, report):
    import jax

    from sana_jax.models import presets
    from sana_jax.models.autoencoder import Autoencoder

    widths = {f"{side}_block_out_channels": (32, 32, 32, 32, 64, 64) for side in ("encoder", "decoder")} if tiny else {}
    config = dataclasses.replace(presets.dc_ae_f32c32_sana_1_1(), dtype="bfloat16", **widths)
    module, key = Autoencoder(config), jax.random.key(2)  # random inputs: zeros can run faster
    images = jax.random.normal(key, (1, pixels, pixels, 3))
    params = random_parameters(module, images)
    for method, x in (("encode", images), ("decode", jax.random.normal(key, (1, pixels // 32, pixels // 32, 32)))):
        run = jax.jit(lambda params, x, method=method: module.apply({"params": params}, x, method=method))
        seconds, compilation = timed(run, params, x)
        memory = run.lower(params, x).compile().memory_analysis().temp_size_in_bytes / 2**30
        name = f"DC-AE f32c32 {method} at {pixels}, bf16"
        report.add(name=name, seconds=seconds, compilation_seconds=compilation, temporary_gib=memory)


def measure_step(config, batch, report):
    """The training step of the published recipe on given latents and text features: loss, gradients, CAME."""
    import jax
    import jax.numpy as jnp
    import optax

    from configs import base
    from sana_jax.diffusion import flow
    from sana_jax.models.transformer import SanaTransformer
    from sana_jax.training.optimizers.recipe import make_optimizer

    recipe = base.get_config().optimizer
    recipe.name, recipe.betas = "came", (0.9, 0.999, 0.9999)
    module, (tx, _) = SanaTransformer(config), make_optimizer(recipe, 1000)
    latents, text = random_inputs(config, batch, config.sample_size)
    params = random_parameters(module, latents[:1], jnp.zeros(1), text[0][:1], text[1][:1])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key):
        def loss(params):
            key_sigma, key_noise = jax.random.split(key)
            sigma, timesteps = flow.sample_sigmas(jax.random.split(key_sigma, batch), 3.0)
            noise = jax.random.normal(key_noise, latents.shape)
            velocity = module.apply({"params": params}, flow.interpolate(latents, noise, sigma), timesteps, *text)
            return jnp.mean(flow.flow_loss(velocity, latents, noise))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, key, times = jax.jit(tx.init)(params), jax.random.key(0), []
    for _ in range(8):
        began = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, key))
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[2:])
    report.add(
        name=f"training step at {config.sample_size * 32}, bf16, CAME, remat {config.remat}, batch {batch}",
        seconds=seconds,
        images_per_second=batch / seconds,
        compilation_seconds=times[0],
    )


def random_inputs(config, batch, side):
    """Latents, and text features with their mask; random, because ones and zeros can run faster than real data."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(2))
    latents = jax.random.normal(keys[0], (batch, side, side, config.in_channels))
    features = jax.random.normal(keys[1], (batch, 300, config.caption_channels), jnp.bfloat16)
    return latents, (features, jnp.ones((batch, 300), jnp.int32))


def random_parameters(module, *example):
    """Random values in the parameters' shapes: initialising a large model itself would take longer than timing it."""
    import jax
    import jax.numpy as jnp

    shapes = jax.eval_shape(module.init, jax.random.key(0), *example)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.float32), static_argnums=1)
    return tree.unflatten([draw(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


def timed(function, *arguments, repeats: int = 7) -> tuple[float, float]:
    """(median seconds of a call, seconds of the first call, which compiles)."""
    import jax

    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), times[0]


# Train


def train(arguments, report) -> int:
    """One leg of train.py, ended by SIGTERM in time to save."""
    began, workdir = time.perf_counter(), arguments.out / "run"
    command = [sys.executable, "train.py", f"--config={arguments.config}", f"--workdir={workdir}"]
    command += ["--config.train.export_dtype=float16", *arguments.overrides]
    if arguments.from_parts:
        earlier = unpack(arguments.from_parts, arguments.out / "earlier")
        continued = (earlier / "transformer").is_dir() or "autoencoder" in arguments.config
        command.append(f"--config.{'init_from' if continued else 'autoencoder_path'}={earlier}")
        if continued and (earlier / "transformer").is_dir():
            command.append(f"--config.autoencoder_path={earlier}")
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        process.wait(timeout=60 * arguments.minutes - 45)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    parts = pack(workdir, arguments.out)
    seconds = time.perf_counter() - began
    report.add(name="training leg", exit_code=process.returncode, seconds=seconds, parts=parts, last=metrics[-1])
    return process.returncode


def pack(workdir: pathlib.Path, out: pathlib.Path) -> int:
    """The export with config, metrics and the last samples, in files small enough to be copied; returns their number."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(workdir / "export", arcname="export")
        for name in ("config.json", "metrics.jsonl"):
            tar.add(workdir / name, arcname=f"export/training/{name}")
        for picture in sorted((workdir / "samples").glob("*.png"))[-1:]:
            tar.add(picture, arcname="export/training/heldout.png")
    data = buffer.getvalue()
    starts = range(0, len(data), PART_BYTES)
    for number, start in enumerate(starts):
        (out / f"export.tar.part{number}").write_bytes(data[start : start + PART_BYTES])
    return len(starts)


def unpack(parts: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The `export` folder out of the parts of an earlier leg."""
    files = sorted(parts.glob("export.tar.part*"), key=lambda file: int(file.suffix.removeprefix(".part")))
    if not files:
        raise FileNotFoundError(f"--from_parts={parts} holds no export.tar.part*; give the --out of an earlier leg")
    with tarfile.open(fileobj=io.BytesIO(b"".join(file.read_bytes() for file in files))) as tar:
        tar.extractall(folder, filter="data")
    return folder / "export"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
