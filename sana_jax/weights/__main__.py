"""`python -m sana_jax.weights inspect PATH`: what a model on disk is, and how it would be used."""

import argparse
import pickle
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m sana_jax.weights", description=__doc__)
    inspect = parser.add_subparsers(dest="command", required=True).add_parser(
        "inspect", help="family, sizes, settings; reads headers and JSON files only"
    )
    inspect.add_argument(
        "path",
        help="pipeline folder in the diffusers layout, a part's folder, a training run's, or a file of the original code",
    )
    options = parser.parse_args(arguments)
    from sana_jax.weights.summary import describe

    try:
        lines = describe(options.path)
    except (ValueError, OSError, pickle.UnpicklingError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
