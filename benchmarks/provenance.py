"""What a result says of its origin: the commit, the machine, the packages."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What tells processors of one name apart: the instructions for products, as Linux names them, the best first.
INSTRUCTIONS = {"amx_tile": "AMX", "avx512_bf16": "AVX-512 and its bfloat16", "avx512f": "AVX-512", "avx2": "AVX2"}


def commit() -> str:
    """The commit that is measured, marked where tracked files other than results differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = _output([*git, "rev-parse", "--short=12", "HEAD"])
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"])
    return head + "-dirty" * bool(changed) if head else "unknown"


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> str:
    """Cores, processor with its best instructions for products, and Python."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    processor += next((f" with {text}" for flag, text in INSTRUCTIONS.items() if flag in flags), "")
    return f"{os.cpu_count()} cores, {processor}, Python {platform.python_version()}"


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages."""
    return {package: importlib.metadata.version(package) for package in packages}
