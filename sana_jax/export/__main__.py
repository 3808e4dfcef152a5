"""`python -m sana_jax.export executable|stablehlo`: the sampler as a file.

executable: a folder for `sample.py --executables=FOLDER` and `SanaPipeline.from_pretrained(executables=)`. Its calls start
            without tracing or compiling. Machine code for this machine and these versions.
stablehlo:  a folder with the program for any number of pictures, the weights, the tokenizer and a script that draws with
            them. It needs JAX and runs on any platform named, without sana_jax.
"""

import argparse
import pathlib
import sys

from sana_jax.failures import too_little_memory
from sana_jax.weights.model_index import check_sampling


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or after one line that says what is wrong 2, or 1 for too little memory."""
    options = _parse(arguments)
    try:
        steps = 1 if options.steps is None else options.steps
        guidance = 1.0 if options.guidance is None else options.guidance
        check_sampling(steps, guidance)
        if options.kind == "executable" and options.pictures < 1:
            raise ValueError(f"--pictures={options.pictures}: a call draws at least 1.")
        if options.kind == "executable":
            written = _executable(options)
        else:
            written = _stablehlo(options)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except RuntimeError as error:  # JAX's errors are such
        hint = "smaller --height and --width, --dtype=bfloat16 or --quantization=int8 take less"
        sys.stderr.write(f"error: {too_little_memory(error)}; {hint}.\n")
        return 1
    sys.stdout.writelines(f"{file}  {file.stat().st_size / 1e6:.1f} MB\n" for file in written)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sana_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    executable = kinds.add_parser("executable", help="machine code, for this machine and these versions")
    executable.add_argument(
        "--pictures",
        type=int,
        default=1,
        help="of one call; sample.py draws up to 16 small pictures in one (default: 1)",
    )
    executable.add_argument("--solver", choices=("flow_dpm", "flow_euler", "scm"), help="(default: the model's own)")
    stablehlo = kinds.add_parser("stablehlo", help="a program that runs without sana_jax")
    stablehlo.add_argument("--platforms", default="cpu,cuda,tpu", help="(default: cpu,cuda,tpu)")
    stablehlo.add_argument("--lora", help="as of sample.py (default: none); executables, without weights, are of any")
    stablehlo.add_argument("--lora_scale", type=float, default=1.0, help="(default: 1)")
    for kind in (executable, stablehlo):
        kind.add_argument("--output", type=pathlib.Path, required=True, help="folder to write to")
        kind.add_argument("--model", help="as of sample.py (default: the embedded model)")
        kind.add_argument("--height", type=int, help="in pixels (default: the model's own)")
        kind.add_argument("--width", type=int, help="in pixels (default: the model's own)")
        kind.add_argument("--steps", type=int, help="solver steps (default: the model's own)")
        kind.add_argument("--guidance", type=float, help="guidance scale (default: the model's own)")
        kind.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
        kind.add_argument("--quantization", choices=("int8", "fp8"), help="(default: none)")
    return parser.parse_args(arguments)


def _executable(options: argparse.Namespace) -> list[pathlib.Path]:
    import jax

    jax.config.update("jax_enable_compilation_cache", False)  # what comes out of it cannot be written again
    pipe = _open(options, background=True)
    pipe(
        ["a picture"] * options.pictures,
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        solver=options.solver,
    )
    return pipe.programs.save(options.output)


def _stablehlo(options: argparse.Namespace) -> list[pathlib.Path]:
    from sana_jax.export import stablehlo

    platforms = stablehlo.check_platforms(options.platforms.split(","))
    stablehlo.check_output(options.output)  # before weights are read
    stablehlo.check_quantization(options.quantization)
    return stablehlo.write(
        options.output,
        _open(options, lora=options.lora, lora_scale=options.lora_scale),
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        platforms=platforms,
    )


def _open(options: argparse.Namespace, **kwargs):
    from sana_jax.pipeline import SanaPipeline

    return SanaPipeline.from_pretrained(
        options.model, dtype=options.dtype, quantization=options.quantization, controlnet=False, **kwargs
    )


if __name__ == "__main__":
    sys.exit(main())
