"""`python -m sana_jax.data build emoji|folder`: makes a data set."""

import argparse
import sys
from pathlib import Path

from absl import logging

from sana_jax.data import emoji_build, folder_build


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m sana_jax.data", description=__doc__)
    build = parser.add_subparsers(dest="command", required=True).add_parser("build", help="make a data set")
    kinds = build.add_subparsers(dest="kind", required=True)
    emoji = kinds.add_parser("emoji", help="the emoji set, from npm packages")
    emoji.add_argument(
        "--packages", type=Path, help="folder with the packages' tarballs (default: `npm pack` fetches them)"
    )
    folder = kinds.add_parser(
        "folder", help="pictures X.png, X.jpg, X.jpeg or X.webp, each with its captions in X.txt; or .tar files of such"
    )
    folder.add_argument(
        "--input",
        type=Path,
        required=True,
        help="folder of pictures and captions, or of .tar files; searched recursively",
    )
    folder.add_argument(
        "--heldout",
        type=float,
        default=0.0,
        help="share of the pictures that training never sees, as 0.01 (default: 0)",
    )
    folder.add_argument(
        "--min_score",
        type=float,
        default=0.0,
        help="leave out pictures whose best caption has a lower CLIP score, as 22 (default: none)",
    )
    folder.add_argument(
        "--control",
        action="store_true",
        help="keep with each picture X.control.png, which is to guide a ControlNet",
    )
    for kind in (emoji, folder):
        kind.add_argument("--output", type=Path, required=True, help="folder to make")
        kind.add_argument("--overwrite", action="store_true", help="replace what is there")
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.INFO)
    try:
        if options.kind == "emoji":
            index = emoji_build.build(options.output, options.packages, overwrite=options.overwrite)
        else:
            index = folder_build.build(
                options.input,
                options.output,
                heldout=options.heldout,
                min_score=options.min_score,
                control=options.control,
                overwrite=options.overwrite,
            )
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    pictures, size = (sum(shard[what] for shard in index["shards"]) for what in ("records", "bytes"))
    sys.stdout.write(f"{options.output}: {pictures} pictures, {size / 1e6:.2f} MB\n")
    for style, counts in index.get("counts", {}).items():
        sys.stdout.write(f"  {style:12} {counts['pictures']:5} pictures, {counts['held_out']:4} of them held out\n")
    if options.kind == "folder":
        sys.stdout.write(f"  {index['held_out']} of them held out\n")
        if index["scored"]:
            sys.stdout.write(f"  {index['scored']} of them with captions that have scores\n")
            if index["highest_score"] < 1:
                sys.stderr.write(
                    f"warning: no score is above {index['highest_score']:.3g}; scores are CLIP's cosines times 100, and training "
                    "draws captions from config.data.captions.min_score on, 25\n"
                )
        if index["unmatched_scores"]:
            sys.stderr.write(
                f"warning: {index['unmatched_scores']} pictures have scores of captions that they do not have\n"
            )
        if index["low_score"]:
            sys.stdout.write(f"  {index['low_score']} left out, whose best score is below {options.min_score:g}\n")
        if not index["held_out"]:
            sys.stderr.write(
                "warning: no picture is held out; train with --config.sample.split=train, or build with a larger "
                "--heldout, as 0.01\n"
            )
    if index.get("skipped"):
        sys.stdout.write(f"  {len(index['skipped'])} skipped:\n")
        sys.stdout.writelines(f"    {line}\n" for line in index["skipped"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
