"""The embedded emoji as pictures with captions and the edges that are to guide a ControlNet, as `data build folder --control` reads them.

    python examples/guided_emoji.py --output=DIR

writes DIR/train and, of the pairs of concept and style that no training shows, DIR/heldout: X.png of 64x64 pixels on one of the
backgrounds, X.txt, and X.control.png. For own pictures `edges` or whatever else one wants to guide by takes the place of it: depth,
poses, scribbles.
"""

import argparse
import pathlib
import sys
import zlib

from PIL import Image, ImageFilter, ImageOps

from sana_jax import atomic
from sana_jax.data import emoji
from sana_jax.data.loader import evaluation_items


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder to make")
    options = parser.parse_args(arguments)
    if options.output.exists():
        print(f"guided_emoji.py: error: {options.output} exists; give another folder", file=sys.stderr)
        return 2
    with atomic.new_folder(options.output) as made:
        for split in ("train", "heldout"):
            write(made / split, split)
    return 0


def write(folder: pathlib.Path, split: str) -> None:
    """The emoji of a split, each with its caption and its edges."""
    folder.mkdir()
    for item in evaluation_items(split):
        name = item.record.key.replace("/", "_")
        background = sorted(emoji.BACKGROUNDS)[zlib.crc32(name.encode()) % len(emoji.BACKGROUNDS)]
        picture = Image.fromarray(item.image(background))
        picture.save(folder / f"{name}.png")
        edges(picture).save(folder / f"{name}.control.png")
        (folder / f"{name}.txt").write_text(item.caption(background) + "\n", encoding="utf-8")


def edges(picture: Image.Image) -> Image.Image:
    """Where the brightness changes, in black on white."""
    found = picture.convert("L").filter(ImageFilter.FIND_EDGES)
    found = ImageOps.expand(ImageOps.crop(found, 1), 1)  # the filter leaves the outermost pixels as they were
    return ImageOps.invert(ImageOps.autocontrast(found, cutoff=(0, 2)))


if __name__ == "__main__":
    sys.exit(main())
