"""How far sana_jax is from diffusers and transformers: errors measured by the parity tests, as a table and as JSON.

    python benchmarks/parity_table.py --output=benchmarks/results/parity.json           # minutes
    python benchmarks/parity_table.py --output=benchmarks/results/parity.json --slow    # the full sizes too: 16 GB
    python benchmarks/parity_table.py --output=benchmarks/results/parity.json --report=FILE   # of a run of this commit, with
                                                          # `pytest -m parity -o junit_family=xunit1 --junitxml=FILE`

Needs the `parity` extra. A row is a checkpoint and what of it was compared: the bound that the tests assert and the largest
error that they met. Ends with pytest's exit code; errors beyond their bound are in the table too.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--slow", action="store_true", help="the whole 1.6B transformer and the whole DC-AE too")
    parser.add_argument("--report", type=pathlib.Path, help="what a run of pytest left: nothing is run anew")
    parser.add_argument("tests", nargs="*", default=["tests/parity"], help="files to run in place of all")
    arguments = parser.parse_args()
    if arguments.report:
        code, rows = 0, read_rows(arguments.report)
    else:
        code, rows = compare(arguments.tests, "parity" if arguments.slow else "parity and not slow")
    found = {
        "what": "largest error of sana_jax against diffusers and transformers, random weights, CPU; see tests/parity",
        "host": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(rows))
    return code


def compare(tests: list[str], marks: str) -> tuple[int, list[dict]]:
    """Runs the tests; pytest's exit code, and the rows."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        flags = ["-q", "-m", marks, "-o", "junit_family=xunit1", f"--junitxml={report}"]
        code = subprocess.run([sys.executable, "-m", "pytest", *flags, *tests], cwd=ROOT, check=False).returncode
        return code, read_rows(report)


def read_rows(report: pathlib.Path) -> list[dict]:
    """One row for each (checkpoint, compared) in pytest's report, in its order."""
    rows = {}
    for prop in xml.etree.ElementTree.parse(report).getroot().iter("property"):
        if prop.get("name") != "parity":
            continue
        fact = json.loads(prop.get("value"))
        row = rows.setdefault((fact["checkpoint"], fact["compared"]), fact | {"comparisons": 0})
        row["comparisons"] += 1
        row["error"], row["bound"] = max(row["error"], fact["error"]), max(row["bound"], fact["bound"])
    return sorted(rows.values(), key=lambda row: row["checkpoint"])


def markdown(rows: list[dict]) -> str:
    """The table of tests/README.md."""
    lines = ["| checkpoint | compared | comparisons | bound | largest error |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['checkpoint']} | {row['compared']} | {row['comparisons']} | {row['bound']:g} | {row['error']:.2g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
