"""An examination's result as a table, as JSON and as a grid of pictures."""

import importlib.metadata
import io
import json
import pathlib
import platform

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sana_jax import atomic
from sana_jax.evaluation.emoji import Result, Row

GRID_SIDE = 8
_GAP = 4
_SHOWN_SIDE = 128  # smaller pictures are enlarged to it
_GRID_SEED = 0


def table(result: Result) -> str:
    """The measures as aligned text: what was reached, the bar, and the same measure on real drawings."""
    head = ("measure", "reached", "bar", "", "real drawings", "reconstructed")
    lines = [head, *(_cells(row) for row in result.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, 3) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    def number(value):
        return "" if value is None else f"{value:.{1 if row.unit else 3}f} {row.unit}".rstrip()

    bar = "" if row.bar is None else f">= {row.bar:g} {row.unit}"
    verdict = {None: "", True: "reached", False: "missed"}[row.passed]
    return row.name, number(row.reached), bar, verdict, number(row.real), number(row.reconstructed)


def write_json(file: pathlib.Path, result: Result, *, command: str, settings: dict) -> None:
    """Writes all numbers with what is needed to make them again."""
    packages = ("sana_jax", "jax", "jaxlib", "flax", "numpy", "pillow")
    content = {
        "command": command,
        "settings": settings,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "machine": f"{platform.system()} {platform.machine()}",
        "measures": [
            {
                "name": row.name,
                "unit": row.unit,
                "reached": row.reached,
                "bar": row.bar,
                "passed": row.passed,
                "real": row.real,
                "reconstructed": row.reconstructed,
            }
            for row in result.rows
        ],
        **result.details,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_file(file, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_grid(file: pathlib.Path, result: Result) -> pathlib.Path:
    """Writes 8 x 8 generated pictures, drawn at random with a fixed seed, and beside them a text file of their prompts.

    Returns:
      The text file: one line per picture, in reading order.
    """
    order = np.random.default_rng(_GRID_SEED).permutation(len(result.asked))[: GRID_SIDE**2]
    grid = make_grid(result.generated[order], GRID_SIDE)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    grid.save(content, "png")
    atomic.write_file(file, content.getvalue())
    prompts = file.with_suffix(".txt")
    lines = [
        f"row {i // GRID_SIDE + 1}, column {i % GRID_SIDE + 1}: {result.asked.prompts[n]}" for i, n in enumerate(order)
    ]
    atomic.write_file(prompts, ("\n".join(lines) + "\n").encode())
    return prompts


def make_grid(pictures: UInt8[np.ndarray, "N H W 3"], columns: int) -> Image.Image:
    """Pictures in reading order on white, small ones enlarged by a whole factor (bicubic)."""
    height, width = (side * max(1, _SHOWN_SIDE // pictures.shape[1]) for side in pictures.shape[1:3])
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for number, picture in enumerate(pictures):
        shown = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        grid.paste(shown, (number % columns * (width + _GAP), number // columns * (height + _GAP)))
    return grid
