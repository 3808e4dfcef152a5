"""Measures a model: python -m sana_jax.evaluation emoji [--model DIR] [--output FILE.json] [--grid FILE.png]

Draws a picture for every held-out (concept, style) pair of the embedded emoji set and prints one table of what was reached
beside the bar and beside the same measures on real drawings.
"""

import argparse
import pathlib
import shlex
import sys

from absl import logging

from sana_jax import atomic
from sana_jax.failures import too_little_memory


def main(argv: list[str]) -> int:
    """Exit code: 0, or with one line on stderr 2 for input that cannot be used, 1 for too little memory."""
    parser = argparse.ArgumentParser(prog="python -m sana_jax.evaluation", description=__doc__.split("\n\n")[1])
    parser.add_argument("set", choices=("emoji",), help="what is measured: the emoji set's held-out pairs")
    parser.add_argument(
        "--model", help="model folder or training run's folder (default: the model that comes with the package)"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="only so many held-out pairs, a fixed random choice (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the pictures' noise (default: 0)")
    parser.add_argument("--steps", type=int, help="of the sampler (default: the model's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's own)")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for all numbers, with versions and command")
    parser.add_argument(
        "--grid", type=pathlib.Path, help="PNG file for 8 x 8 pictures; their prompts go into a .txt beside it"
    )
    arguments = parser.parse_args(argv)
    logging.set_verbosity(logging.INFO)
    try:
        _run(arguments, argv)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"sana_jax.evaluation: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # JAX's errors are such
        print(
            f"sana_jax.evaluation: error: {too_little_memory(error)}; models are measured in float32.", file=sys.stderr
        )
        return 1
    return 0


def _run(arguments: argparse.Namespace, argv: list[str]) -> None:
    from sana_jax.evaluation import emoji, report
    from sana_jax.pipeline import SanaPipeline
    from sana_jax.weights import efficientnet, model_index

    model_index.check_sampling(1 if arguments.steps is None else arguments.steps, arguments.guidance or 1.0)
    model_index.check_pictures(num_images=1, seed=arguments.seed)
    efficientnet.find()  # whether the judge can be had, before minutes are spent
    _prepare_files(arguments)
    pipe = SanaPipeline.from_pretrained(arguments.model, controlnet=False)
    steps = pipe.defaults.num_inference_steps if arguments.steps is None else arguments.steps
    result = emoji.evaluate(pipe, limit=arguments.limit, seed=arguments.seed, steps=steps, guidance=arguments.guidance)
    print(f"{len(result.asked)} held-out pairs, {pipe.default_height}x{pipe.default_width}, {steps} steps")
    print(report.table(result))
    if arguments.output:
        settings = {
            "model": arguments.model or "embedded",
            "side": pipe.default_height,
            "seed": arguments.seed,
            "steps": steps,
            "guidance": pipe.defaults.guidance_scale if arguments.guidance is None else arguments.guidance,
            "solver": pipe.defaults.solver,
            "limit": arguments.limit,
        }
        command = shlex.join(["python", "-m", "sana_jax.evaluation", *argv])
        report.write_json(arguments.output, result, command=command, settings=settings)
        print(arguments.output)
    if arguments.grid:
        prompts = report.write_grid(arguments.grid, result)
        print(arguments.grid, prompts, sep="\n")


def _prepare_files(arguments: argparse.Namespace) -> None:
    """Makes the folders of --output and --grid, and refuses files that cannot be written before anything is drawn."""
    files = {"--output": arguments.output, "--grid": arguments.grid}
    if arguments.grid is not None:
        if arguments.grid.suffix.lower() != ".png":
            raise ValueError(f"--grid={arguments.grid} does not end in .png; the grid is written as PNG.")
        files["prompts of --grid"] = arguments.grid.with_suffix(".txt")
    for what, file in files.items():
        try:
            if file is not None:
                atomic.prepare_file(file)
        except OSError as error:
            raise ValueError(
                f"{what}={file} cannot be written ({error}); give a file in a folder that you may write to."
            ) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
