"""What eight-bit products cost: latents after 20 guided steps from the same noise, against bfloat16 and float32.

    python benchmarks/quantization.py                                    # the embedded model, eight prompts
    python benchmarks/quantization.py --preset=sana_600m --pixels=512    # a public size, random weights
    python benchmarks/quantization.py --preset=sana_1600m --pixels=1024 --repeats=5    # on a GPU: times too

PSNR is 10 log10(range^2 / mean squared error) in dB, range being largest minus smallest latent of the picture in float32;
the mean over pictures is given, and the least. bfloat16 against float32 is the yardstick. Of the embedded model the whole
pipeline is of the given dtype; of a preset it is the transformer, on random text features. Random weights: each layer keeps
the variance of its input and the gates are of order one, so that every product counts; but no channel stands out, as some
do in trained weights. Writes benchmarks/results/quantization.json, in place of the row of the same model.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time

from provenance import ROOT, commit, machine, versions

STEPS = 20
PROMPTS = (
    "a red apple",
    "a smiling cat face",
    "a yellow star",
    "a green tree",
    "a blue car",
    "a slice of pizza",
    "a house with a garden",
    "a snowman",
)
# name -> (dtype, quantization)
VARIANTS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
    "fp8": ("bfloat16", "fp8"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=("sana_600m", "sana_1600m"), help="(default: the embedded model)")
    parser.add_argument("--pixels", type=int, default=512, help="side of a preset's picture (default: 512)")
    parser.add_argument("--layers", type=int, help="blocks of a preset, to try the script (default: all)")
    parser.add_argument("--repeats", type=int, default=0, help="timed calls of each (default: 0, errors alone)")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))

    import jax
    import numpy as np

    if arguments.preset is None:
        name, variant = "embedded", embedded
    else:
        name = f"{arguments.preset}, {arguments.pixels} px, random weights"
        name += f", {arguments.layers} blocks" if arguments.layers else ""
        variant = functools.partial(preset, arguments.preset, arguments.pixels, arguments.layers)
    latents, rows = {}, []
    for label, choice in VARIANTS.items():
        draw, params = variant(*choice)
        began = time.perf_counter()
        latents[label] = np.asarray(draw(), np.float64)
        print(f"{label}: {time.perf_counter() - began:.0f} s with compilation", flush=True)
        times = [_seconds(draw) for _ in range(arguments.repeats)]
        rows.append({"variant": label, "transformer_bytes": sum(x.nbytes for x in jax.tree.leaves(params))})
        if times:
            rows[-1]["seconds"] = statistics.median(times)
        del draw, params
    for row in rows:
        for reference in ("bfloat16", "float32"):
            if row["variant"] not in (reference, "float32"):
                row |= compare(latents[row["variant"]], latents[reference], latents["float32"], reference)
    show(name, rows)
    save(name, rows)
    return 0


def compare(latents, reference, exact, label) -> dict:
    """PSNR and relative L2 error of pictures [B, h, w, C], by picture."""
    import numpy as np

    axes = (1, 2, 3)
    mse = np.mean((latents - reference) ** 2, axes)
    psnr = 10 * np.log10((exact.max(axes) - exact.min(axes)) ** 2 / mse)
    relative = np.sqrt(mse / np.mean(reference**2, axes))
    return {
        f"psnr_to_{label}": round(float(psnr.mean()), 2),
        f"least_psnr_to_{label}": round(float(psnr.min()), 2),
        f"relative_error_to_{label}": round(float(relative.mean()), 5),
    }


def embedded(dtype: str, quantization: str | None):
    """(function that draws the prompts' latents, parameters of the transformer) of the embedded model."""
    from sana_jax import SanaPipeline

    pipe = SanaPipeline.from_pretrained(dtype=dtype, quantization=quantization)
    draw = functools.partial(pipe, list(PROMPTS), num_inference_steps=STEPS, output_type="latent")
    return draw, pipe.params["transformer"]


def preset(name: str, pixels: int, layers: int | None, dtype: str, quantization: str | None):
    """As `embedded`, for a transformer of random weights."""
    import jax
    import jax.numpy as jnp

    from sana_jax.diffusion import guidance, solvers
    from sana_jax.models import presets
    from sana_jax.models.transformer import SanaTransformer
    from sana_jax.quantization import quantize_transformer
    from sana_jax.weights.parts import abstract_params

    side = pixels // 32
    overrides = {"num_layers": layers} if layers else {}
    config = dataclasses.replace(getattr(presets, name)(side, **overrides), dtype=dtype)
    module = SanaTransformer(config)
    params = random_parameters(abstract_params(module), dtype)
    if quantization is not None:
        params = quantize_transformer(params, quantization)
    keys = jax.random.split(jax.random.key(2), 2)
    noise = jax.random.normal(keys[0], (1, side, side, config.in_channels))
    features = jax.random.normal(keys[1], (2, 300, config.caption_channels)).astype(dtype)
    mask = jnp.asarray([[1] * 40 + [0] * 260, [1] * 2 + [0] * 298])  # a caption, and the empty one

    @jax.jit
    def draw(params):
        velocity = guidance.classifier_free_guidance(
            lambda x, t, condition: module.apply({"params": params}, x, t, *condition),
            (features[:1], mask[:1]),
            (features[1:], mask[1:]),
            4.5,
        )
        return solvers.sample(velocity, noise, solvers.flow_dpm(STEPS, 3.0))

    return functools.partial(draw, params), params


def random_parameters(shapes, dtype: str):
    """Kernels of variance 1 / fan-in, tables of gates and shifts 0.3, biases 0.02; the same in every dtype."""
    import jax
    from flax import traverse_util

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key, shape, deviation):
        return (deviation * jax.random.normal(key, shape)).astype(dtype)

    def deviation(path, shape):
        if path[-1] != "kernel":
            return 0.3 if path[-1] == "scale_shift_table" else 0.02
        fan_in = 9 if path[-2] == "depthwise" else shape[1 if path[0] == "blocks" else 0]
        return fan_in**-0.5

    params = {}
    for number, (path, x) in enumerate(traverse_util.flatten_dict(shapes).items()):
        values = normal(jax.random.key(number), x.shape, deviation(path, x.shape))
        params[path] = 1 + values if path[-1] == "scale" else values  # of a norm
    return traverse_util.unflatten_dict(params)


def _seconds(draw) -> float:
    import jax

    began = time.perf_counter()
    jax.block_until_ready(draw())
    return time.perf_counter() - began


def show(name: str, rows: list[dict]) -> None:
    """The table, on stdout."""
    print(f"{name}: {STEPS} steps; PSNR mean (least), dB\n{'':9} transformer MB   to bfloat16       to float32")
    for row in rows:
        cells = [
            f"{row[f'psnr_to_{reference}']:6.1f} ({row[f'least_psnr_to_{reference}']:.1f})"
            if f"psnr_to_{reference}" in row
            else "-"
            for reference in ("bfloat16", "float32")
        ]
        seconds = f"  {row['seconds']:.3f} s" if "seconds" in row else ""
        print(f"{row['variant']:9} {row['transformer_bytes'] / 1e6:14.1f}   {cells[0]:>15}  {cells[1]:>15}{seconds}")


def save(name: str, rows: list[dict]) -> None:
    """Writes the rows of this model, with what they were made on."""
    import jax

    file = ROOT / "benchmarks" / "results" / "quantization.json"
    models = json.loads(file.read_text())["models"] if file.is_file() else {}
    models[name] = {
        "command": " ".join(["python", "benchmarks/quantization.py", *sys.argv[1:]]),
        "device": f"{jax.devices()[0].device_kind}, {machine()}",
        "versions": versions("jax", "jaxlib", "flax"),
        "commit": commit(),
        "rows": rows,
    }
    file.write_text(json.dumps({"what": __doc__.split("\n\n")[0], "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
