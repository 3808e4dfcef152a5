"""A model with fewer blocks: python -m sana_jax.pruning --model=FOLDER --prompts_file=FILE [--blocks=N --output=DIR]

Draws a picture for each prompt (the paper took 100) and prints how much each block changes what comes in. With --blocks the model is
written with the N blocks that change the most. It needs some training after that, which starts from DIR:
train.py --config.init_from=DIR --config.model.num_layers=N.
"""

import argparse
import pathlib
import sys

from sana_jax.arguments import prompt_lines
from sana_jax.failures import too_little_memory
from sana_jax.weights import model_index


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or after one line that says what is wrong 2, or 1 for too little memory."""
    options = _parse(arguments)
    try:
        _run(options)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except RuntimeError as error:  # JAX's errors are such
        hint = "smaller --height and --width or --dtype=bfloat16 take less"
        sys.stderr.write(f"error: {too_little_memory(error)}; {hint}.\n")
        return 1
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sana_jax.pruning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="as of sample.py (default: the embedded model)")
    parser.add_argument("--prompts_file", required=True, help="text file with one prompt per line")
    parser.add_argument("--blocks", type=int, help="that are kept (default: none is left out, and nothing is written)")
    parser.add_argument("--output", type=pathlib.Path, help="folder for the smaller model")
    parser.add_argument("--height", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--width", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--steps", type=int, help="solver steps (default: the model's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture's noise (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of computation and files (default: float32)",
    )
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> None:
    prompts = prompt_lines("--prompts_file", options.prompts_file)
    model_index.check_prompts(prompts)
    model_index.check_sampling(
        1 if options.steps is None else options.steps, 1.0 if options.guidance is None else options.guidance
    )
    model_index.check_pictures(len(prompts), options.seed)
    if (options.blocks is None) != (options.output is None):
        raise ValueError("give --blocks=N and --output=DIR together, or neither.")

    from sana_jax.pipeline import SanaPipeline
    from sana_jax.pruning.blocks import block_importance, most_important, with_blocks
    from sana_jax.weights.folder import check_replaceable

    if options.output is not None:
        check_replaceable(options.output.resolve())
    pipe = SanaPipeline.from_pretrained(options.model, dtype=options.dtype, controlnet=False)
    layers = pipe.transformer.config.num_layers
    if options.blocks is not None and not 1 <= options.blocks < layers:
        raise ValueError(f"--blocks={options.blocks}: the model has {layers} blocks; keep 1 to {layers - 1}.")
    importance = block_importance(
        pipe,
        prompts,
        options.seed,
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
    )
    kept = most_important(importance, options.blocks or layers)
    print("block  importance")
    for number, value in enumerate(importance):
        print(f"{number:5}  {value:10.4f}{'' if number in kept else '  left out'}")
    if options.output is not None:
        with_blocks(pipe, kept).save_pretrained(options.output, dtype=options.dtype)
        print(options.output)


if __name__ == "__main__":
    sys.exit(main())
