"""Makes a set from a folder of pictures, each with its captions in a text file of the same name."""

from collections.abc import Iterator
from pathlib import Path

from absl import logging
from PIL import Image

from sana_jax.data import records, transforms

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def build(source: Path, output: Path, *, heldout: float = 0.0, overwrite: bool = False) -> dict:
    """Packs `source` (X.png, X.jpg, X.jpeg or X.webp with X.txt, in any depth) into the set `output`.

    Every line of X.txt that is not empty is one caption; training draws one of them at a time. The picture files are
    kept as they are. A picture that cannot be decoded, or that has no caption, is skipped, logged and listed in
    `dataset.json`.

    Args:
      source, output: the folders.
      heldout: share of the pictures, from 0 to below 1, that training never sees (`records.is_held_out`).
      overwrite: `output` may be a set, which is replaced.

    Returns:
      What `dataset.json` says; "held_out" counts the pictures held out, "skipped" lists "FILE: why".

    Raises:
      ValueError: `heldout` is no such share; `source` is no folder, holds no picture, or holds none that can be used; `source` is, or lies in,
        `output`, which would be replaced; or `output` holds files (`records.check_output`).
    """
    if not 0 <= heldout < 1:
        raise ValueError(f"--heldout={heldout} is not a share from 0 to below 1; 0.01 holds out a hundredth")
    source, output = Path(source), Path(output)
    if not source.is_dir():
        raise ValueError(f"--input {source} is not a folder")
    if source.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"--output {output} would replace the pictures of --input {source}; give another folder")
    records.check_output(output, overwrite)
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"{source} holds no picture ({', '.join('*' + suffix for suffix in _SUFFIXES)})")
    skipped: list[str] = []
    index = {"kind": "folder", "source": source.name, "heldout": heldout, "held_out": 0, "skipped": skipped}
    try:
        return records.write_dataset(output, _read(files, source, index), index, overwrite=overwrite)
    except ValueError as error:
        if len(skipped) < len(files):
            raise
        raise ValueError(
            f"none of the {len(files)} pictures in {source} can be used; the first: {skipped[0]}"
        ) from error


def _read(files: list[Path], source: Path, index: dict) -> Iterator[records.Record]:
    """The records, while `index` counts and lists them."""
    for file in files:
        name = file.relative_to(source)
        try:
            picture = file.read_bytes()
            captions = _captions(file.with_suffix(".txt"))
            transforms.decode(picture)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
            index["skipped"].append(f"{name}: {error}")
            logging.warning("skipped %s: %s", name, error)
            continue
        index["held_out"] += records.is_held_out(name.as_posix(), index["heldout"])
        yield records.Record(name.as_posix(), picture, captions)


def _captions(file: Path) -> tuple[str, ...]:
    if not file.is_file():
        raise ValueError(f"has no caption: {file.name} is missing")
    lines = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    if not lines:
        raise ValueError(f"has no caption: {file.name} is empty")
    return lines
