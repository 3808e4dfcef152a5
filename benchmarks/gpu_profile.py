"""Where the time of a picture goes on a GPU, for `gpu_session.py profile`: seconds of each kernel of one call, by kind.

A row a kind of kernel of the call's program, the longest first: its name without numbers, how often it ran, its seconds.
OUT/NAME.operations.json has them by operation of the program, with the name that the model's source gives it, and
OUT/NAME.trace.json.gz is the whole trace, for a viewer.
"""

import collections
import functools
import gzip
import json
import pathlib
import re
import tempfile

import gpu_pictures

SHOWN = 40


def measure(report, out: pathlib.Path, tiny: bool, only: str) -> None:
    """Of our calls of `gpu_pictures` in bfloat16 that match."""
    import jax

    for name, (preset, pixels, batch) in gpu_pictures.calls(tiny).items():
        if not re.search(only, name):
            continue
        stem = re.sub("[^a-zA-Z0-9]+", "_", name)
        pipe = gpu_pictures.our_pipeline(gpu_pictures.configs(preset, pixels, tiny), None)
        draw = functools.partial(gpu_pictures.draw, pipe, pixels, batch)
        seconds, first = gpu_pictures.timed(draw)
        report.add(name=f"sana_jax: {name}, bf16", seconds=seconds, compilation_seconds=first)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                draw()
            (file,) = pathlib.Path(folder).rglob("*.trace.json.gz")
            compressed = file.read_bytes()
        (out / f"{stem}.trace.json.gz").write_bytes(compressed)
        events = json.loads(gzip.decompress(compressed))["traceEvents"]
        kernels = list(_kernels(events))
        for kind, (count, seconds) in _sums(kernels, lambda kernel: re.sub(r"[\d.]+", "", kernel["name"]))[:SHOWN]:
            report.add(name=f"kernel of {name}: {kind}", count=count, seconds=seconds)
        operations = _sums(kernels, lambda kernel: json.dumps([kernel["name"], kernel.get("args", {})]))
        rows = [[*json.loads(key), *value] for key, value in operations]
        (out / f"{stem}.operations.json").write_text(json.dumps(rows, indent=0))


def _kernels(events: list[dict]):
    """What ran on the device's streams."""
    names = {
        (event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and "name" in event.get("args", {})
    }
    for event in events:
        if event.get("ph") == "X" and names.get((event["pid"], event["tid"]), "").startswith("Stream"):
            yield event


def _sums(kernels: list[dict], key) -> list[tuple[str, tuple[int, float]]]:
    """(key, (how many, seconds)), the longest first."""
    found = collections.defaultdict(lambda: (0, 0.0))
    for kernel in kernels:
        count, seconds = found[key(kernel)]
        found[key(kernel)] = count + 1, seconds + kernel["dur"] / 1e6
    return sorted(found.items(), key=lambda item: -item[1][1])
