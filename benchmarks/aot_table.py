"""Which configurations compile for which pods, and what their steps need: the table in this folder's README.

    python benchmarks/aot_table.py              # compiles the rows that are not yet in the result, one after the other
    python benchmarks/aot_table.py --only=4k    # of these, the rows whose name contains a text
    python benchmarks/aot_table.py --print      # the table of what is there

Needs libtpu (`pip install -e '.[aot]'`) and no TPU; the row of h100, `jax[cuda13]` in an environment of its own, and no GPU.
A row takes about 8 minutes of one core, in a process of its own, and is written to benchmarks/results/aot.json at once
(`compiled_rows`). Nothing is run on a device: memory is the compiler's, step times and MFU are bounds from published peaks
(`sana_jax/aot/report.py`).
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import compiled_rows
from provenance import ROOT, versions

RESULT = ROOT / "benchmarks" / "results" / "aot.json"

# Name -> config, topology, overrides. Batches are the published ones where they fit.
ROWS = {
    "0.6B 1024 on v5e": ("sana_600m_1024", "v5e:16x16", {}),
    "0.6B 1024 on v5p": ("sana_600m_1024", "v5p:8x8x8", {}),
    "0.6B 1024 on v6e": ("sana_600m_1024", "v6e:16x16", {}),
    "1.6B 1024 on v5e": ("sana_1600m_1024", "v5e:16x16", {}),
    "1.6B 1024 on v5p": ("sana_1600m_1024", "v5p:8x8x8", {}),
    "1.6B 1024 on v6e": ("sana_1600m_1024", "v6e:16x16", {}),
    "4.8B 1024 CAME-8bit on v5p": ("sana15_4800m_1024", "v5p:4x4x4", {}),
    "4.8B 1024 CAME-8bit on v6e": ("sana15_4800m_1024", "v6e:16x16", {}),
    "1.6B 4096 seq on v5p": ("sana_1600m_4k", "v5p:4x4x4", {"mesh.fsdp": 4, "mesh.seq": 4, "data.batch_size": 64}),
    "1.6B 1024 on 2 slices": ("sana_1600m_1024", "v5e:16x16*2", {}),
    # From 16 to 512 chips (the row of v5p above) with the same pictures a chip.
    "1.6B 1024 on 16 chips": ("sana_1600m_1024", "v5p:2x2x4", {"data.batch_size": 128}),
    "1.6B 1024 on 64 chips": ("sana_1600m_1024", "v5p:4x4x4", {"data.batch_size": 512}),
    "1.6B 1024 on one host": ("sana_1600m_1024", "h100:8", {"data.batch_size": 128}),
}


def main() -> int:
    return compiled_rows.run(__doc__.split("\n\n")[0], RESULT, ROWS, compile_row, table)


def compile_row(row: tuple[str, str, dict]) -> dict:
    """Runs `train.py --aot`; its report, the command and versions."""
    config, topology, overrides = row
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        flags = [f"--config=configs/{config}.py", f"--aot={topology}"]
        flags += [f"--config.{field}={value}" for field, value in overrides.items()]
        print("python train.py", *flags, flush=True)
        run = subprocess.run([sys.executable, "train.py", *flags, f"--aot_json={file.name}"], cwd=ROOT, check=False)
        if run.returncode not in (0, 1):
            raise SystemExit(run.returncode)
        report = json.loads(pathlib.Path(file.name).read_text())
    used = versions("jax") | {"compiler": report["compiler"]}
    return {"command": " ".join(["python train.py", *flags]), "versions": used} | report


def table(rows: dict[str, dict]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model and pod | mesh (data, fsdp, seq) | batch | memory a chip, GB | sent a chip and step, GB: gather / scatter / "
        "reduce / other | step at least, s | MFU at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        mesh = ", ".join(str(size) for size in row["mesh"].values())
        where = f"| {name} (`{row['topology']}`) | {mesh} | {row['batch_size']:,} |"
        if not row["memory"]:
            lines.append(f"{where} does not fit | | | |")
            continue
        own = row["memory"]["peak"] - row["memory"].get("beside", 0)
        memory = f"{own / 1e9:.1f} of {row['memory']['hbm'] / 1e9:.0f}"
        sent = {kind: total["sent"] / 1e9 for kind, total in row["collectives"].items()}
        named = [sent.pop(kind, 0.0) for kind in ("all-gather", "reduce-scatter", "all-reduce")]
        traffic = " / ".join(f"{value:.2f}" for value in [*named, sum(sent.values())])
        lines.append(f"{where} {memory} | {traffic} | {row['step_seconds']:.2f} | {row['mfu']:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
