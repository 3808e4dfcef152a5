"""How many pictures a second the loader prepares, by itself: read, decoded, scaled and cropped, captioned.

    python benchmarks/input_pictures.py                 # JPEGs of 1600x1200 to 1024x1024, one thread and one for each core
    python benchmarks/input_pictures.py --size=512

Photographs are noise that was smoothed, 0.6 MB each in JPEG. Beside them stands a row of the embedded emoji at 64x64, decoded
before. Prints JSON.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
from PIL import Image
from provenance import commit, machine, versions

from sana_jax.data import loader, records

PICTURES, BATCH, BATCHES = 64, 16, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="side that they are scaled to, in pixels")
    arguments = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "set"
        records.write_dataset(path, photographs(), {})
        for threads in sorted({1, os.cpu_count() or 1}):
            config = loader.LoaderConfig(
                path=str(path), image_size=arguments.size, batch_size=BATCH, cache_mb=0, threads=threads, prefetch=1
            )
            rows[f"photographs to {arguments.size}, {threads} threads"] = pictures_a_second(config, BATCHES)
    rows["emoji at 64, 1 thread"] = pictures_a_second(loader.LoaderConfig(batch_size=64), 20 * BATCHES)
    result = {
        "commit": commit(),
        "machine": machine(),
        "versions": versions("numpy", "pillow"),
        "pictures a second": rows,
    }
    print(json.dumps(result, indent=1))
    return 0


def photographs():
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((1600, 1200), Image.Resampling.BICUBIC)).astype(int)
        noisy = np.clip(smooth + rng.integers(-12, 12, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        yield records.Record(f"{number}.jpg", file.getvalue(), captions=("a photograph",))


def pictures_a_second(config: loader.LoaderConfig, batches: int) -> float:
    with contextlib.closing(loader.make_loader(config, seed=0)) as prepared:
        for _ in range(config.prefetch + 1):
            next(prepared)
        began = time.perf_counter()
        for _ in range(batches):
            next(prepared)
        return round(batches * config.batch_size / (time.perf_counter() - began), 1)


if __name__ == "__main__":
    sys.exit(main())
