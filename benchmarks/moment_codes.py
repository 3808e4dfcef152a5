"""How far Adam goes from float32's updates when its moments are kept in eight bits, by the code that they are kept in.

    python -m benchmarks.moment_codes [--block=2240] [--steps=4000]

NumPy alone, on independent gradients: two blocks of weights whose gradients have scales that differ within
the block (lognormal, sigma 1), drawn from Student's t of 5 degrees at each step; 2 % of the weights never have
one. "Drifting": over the first half of the steps every scale moves by a lognormal factor of sigma 1.5. The error is
the distance of the updates from float32's over the latter's size, its mean over the last half of the steps. Writes
benchmarks/results/moment_codes.json.
"""

import argparse
import json
import pathlib

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
B1, B2, EPS = 0.9, 0.999, 1e-8
GOLDEN = (5**0.5 - 1) / 2


def linear(x, threshold=0.5):
    """`quantise` and back; a block is a row."""
    low = x.min(1, keepdims=True)
    scale = (x.max(1, keepdims=True) - low) / 255
    return np.clip(np.floor((x - low) / np.where(scale > 0, scale, 1) + threshold), 0, 255) * scale + low


def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 values of the dynamic 8-bit type (Dettmers et al. 2022, section 1.3): seven decades, finer at the top."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1)
        means = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*means, *(-means if signed else ())]
    return np.sort(values)


def dynamic(x, values):
    """To the nearest of `values` times the largest of the row, and back."""
    largest = np.abs(x).max(1, keepdims=True)
    middles = (values[1:] + values[:-1]) / 2
    return values[np.searchsorted(middles, x / np.where(largest > 0, largest, 1))] * largest


def ratio_and_root(m, v, threshold):
    kept = linear(v**0.25, threshold) ** 4
    ratio = np.where(v > 0, m / np.sqrt(np.where(v > 0, v, 1)), 0)
    return linear(ratio) * np.sqrt(kept), kept


SIGNED, UNSIGNED = dynamic_map(True), dynamic_map(False)
# name -> (m, v, step) to what is left of m and v
CODES = {
    "m and v linear": lambda m, v, n: (linear(m), linear(v)),
    "m linear, fourth root of v": lambda m, v, n: (linear(m), linear(v**0.25) ** 4),
    "m and v by the dynamic map": lambda m, v, n: (dynamic(m, SIGNED), dynamic(v, UNSIGNED)),
    "ratio, fourth root of v": lambda m, v, n: ratio_and_root(m, v, 0.5),
    "ratio, fourth root of v, moving threshold": lambda m, v, n: ratio_and_root(m, v, n * GOLDEN % 1),
}


def errors(block: int, steps: int, *, drifting: bool) -> dict[str, float]:
    """Mean relative error of the updates, by the name of the code."""
    rng = np.random.default_rng(0)
    shape = (2, block)
    first = np.exp(rng.normal(size=shape)) * 1e-3 * (rng.random(shape) >= 0.02)
    last = first * np.exp(1.5 * rng.normal(size=shape)) if drifting else first
    moments = {name: (np.zeros(shape), np.zeros(shape)) for name in ("float32", *CODES)}
    found = {name: [] for name in CODES}
    for n in range(1, steps + 1):
        share = min(1, 2 * n / steps)
        gradient = (first * (1 - share) + last * share) * rng.standard_t(5, size=shape)
        updates = {}
        for name, (m, v) in moments.items():
            m, v = B1 * m + (1 - B1) * gradient, B2 * v + (1 - B2) * gradient**2
            updates[name] = m / (1 - B1**n) / (np.sqrt(v / (1 - B2**n)) + EPS)
            moments[name] = CODES[name](m, v, n) if name in CODES else (m, v)
        if n > steps // 2 and n % 50 == 0:
            exact = updates["float32"]
            for name in CODES:
                found[name].append(np.linalg.norm(updates[name] - exact) / np.linalg.norm(exact))
    return {name: float(np.mean(values)) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--block", type=int, default=2240)
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    steady, drifting = (errors(arguments.block, arguments.steps, drifting=drifting) for drifting in (False, True))
    report = {"what": __doc__.split("\n\n")[0], "numpy": np.__version__} | vars(arguments)
    report["errors"] = {name: {"steady": steady[name], "drifting": drifting[name]} for name in CODES}
    file = ROOT / "benchmarks" / "results" / "moment_codes.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'code':42} {'steady':>10} {'drifting':>10}")
    for name in CODES:
        print(f"{name:42} {steady[name]:10.3g} {drifting[name]:10.3g}")


if __name__ == "__main__":
    main()
