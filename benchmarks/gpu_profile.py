"""Where the time of a picture goes on a GPU, for `gpu_session.py profile`: one call of ours in bfloat16, traced.

A row a part of the model, the longest first, with how many kernels ran for it and their seconds. A kernel belongs to the part
that the compiled program names for it. Calls of cuBLAS, cuDNN and Mosaic in CUDA graphs have no such name, and are rows of their own.
OUT/NAME.trace.json.gz is the whole trace, for a viewer, OUT/NAME.program.txt.gz the program.
"""

import collections
import functools
import gzip
import json
import os
import pathlib
import re
import tempfile

import gpu_pictures

SHOWN = 40
DUMPS = pathlib.Path(tempfile.gettempdir()) / "gpu_profile_programs"
# What a path in a program has besides names of modules.
_NO_MODULES = {
    "while",
    "body",
    "cond",
    "eval_jaxpr",
    "closed_call",
    "checkpoint",
    "rematted_computation",
    "blocks",
    "layers",
}
_LIBRARIES = {
    "nvjet": "cuBLAS: products",
    "sdpa": "cuDNN: attention",
    "mosaic": "Mosaic: kernels",
    "cudnn": "cuDNN: others",
}


def keep_programs() -> None:
    """Has XLA write the sampler's programs down; to be called before JAX is imported."""
    flags = f"--xla_dump_to={DUMPS} --xla_dump_hlo_module_re=jit_draw --xla_dump_hlo_as_text"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


def measure(report, out: pathlib.Path, tiny: bool, only: str) -> None:
    """Of our calls of `gpu_pictures` that match."""
    import jax

    for name, (preset, pixels, batch) in gpu_pictures.calls(tiny).items():
        if not re.search(only, name):
            continue
        pipe = gpu_pictures.our_pipeline(gpu_pictures.configs(preset, pixels, tiny), None)
        draw = functools.partial(gpu_pictures.draw, pipe, pixels, batch)
        seconds, first = gpu_pictures.timed(draw)
        report.add(name=f"sana_jax: {name}, bf16", seconds=seconds, compilation_seconds=first)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                draw()
            (file,) = pathlib.Path(folder).rglob("*.trace.json.gz")
            trace = file.read_bytes()
        program = max(DUMPS.glob("*after_optimizations.txt"), key=os.path.getmtime).read_text()
        stem = out / re.sub("[^a-zA-Z0-9]+", "_", name)
        stem.with_suffix(".trace.json.gz").write_bytes(trace)
        stem.with_suffix(".program.txt.gz").write_bytes(gzip.compress(program.encode()))
        for part, (count, seconds) in by_part(json.loads(gzip.decompress(trace))["traceEvents"], program)[:SHOWN]:
            report.add(name=f"{name}: {part}", kernels=count, seconds=seconds)


def by_part(events: list[dict], program: str) -> list[tuple[str, tuple[int, float]]]:
    """(part, (kernels, seconds)), the longest first.

    Args:
      events: of a trace.
      program: optimised HLO, as text.
    """
    operations = dict(re.findall(r'^\s*(?:ROOT )?%([\w.\-]+) = .*?op_name="([^"]*)"', program, re.MULTILINE))
    found = collections.defaultdict(lambda: (0, 0.0))
    for kernel in _kernels(events):
        part = _part(kernel, operations)
        count, seconds = found[part]
        found[part] = count + 1, seconds + kernel["dur"] / 1e6
    return sorted(found.items(), key=lambda item: -item[1][1])


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


def _part(kernel: dict, operations: dict[str, str]) -> str:
    name, arguments = kernel["name"], kernel.get("args", {})
    # Within a CUDA graph a kernel is known by its own name alone, which is that of the fusion it was made for.
    fusions = arguments.get("hlo_op"), name, re.sub(r"_(\d+)$", r".\1", name)
    path = arguments.get("name") or next((operations[fusion] for fusion in fusions if fusion in operations), "")
    modules = [re.sub(r"\d+", "", each) for each in path.split("/") if _is_module(each)]
    if modules:
        return "/".join(modules[:3])
    return next((label for key, label in _LIBRARIES.items() if key in name), "others")


def _is_module(name: str) -> bool:
    from jax import lax

    if not name or "(" in name or "->" in name or name.startswith("branch_") or hasattr(lax, f"{name}_p"):
        return False  # a transformation, an einsum, a branch, a primitive
    return name not in _NO_MODULES
