"""Results of scripts that compile one row after the other, minutes each, for accelerators that are not here.

Each row is written at once, so that such a script can be stopped and started again, and several of them can run side by side
with rows of their own (`--only`).
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from provenance import commit, machine


def run(
    what: str,
    result: pathlib.Path,
    rows: Mapping[str, Any],
    compile_row: Callable[[Any], dict],
    table: Callable[[dict[str, dict]], str],
) -> int:
    """The script's command line: compiles the rows that are not yet in the result, and prints its table.

    Args:
      what: the rows show, in a sentence.
      result: JSON file.
      rows: name -> what `compile_row` takes.
      compile_row: the row as it is written, without its commit.
      table: of the rows by name, in Markdown.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--only", default="", help="text that a row's name contains")
    parser.add_argument("--print", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    if not any(arguments.only in name for name in rows):
        parser.error(f"--only={arguments.only}: in none of {'; '.join(rows)}")
    for name, row in rows.items():
        if arguments.print or name in read(result) or arguments.only not in name:
            continue
        print(name, flush=True)
        compiled = {"commit": commit()} | compile_row(row)
        write(what, result, rows, read(result) | {name: compiled})  # another of these scripts may have written
    found = read(result)
    print(table({name: found[name] for name in rows if name in found}))
    return 0


def read(result: pathlib.Path) -> dict[str, dict]:
    """Name -> row of what was compiled so far."""
    return json.loads(result.read_text())["rows"] if result.is_file() else {}


def write(what: str, result: pathlib.Path, order: Mapping[str, Any], rows: dict[str, dict]) -> None:
    """Writes the rows in the order of the names."""
    content = {
        "what": what,
        "source": "XLA's compilers and bounds from published peaks; nothing was run on a device",
        "host": machine(),
        "rows": {name: rows[name] for name in order if name in rows},
    }
    result.write_text(json.dumps(content, indent=1) + "\n")
