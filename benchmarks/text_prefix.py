"""How much time the cached instruction saves: plain against cached encoding of prompts, in one run, alternating.

Gemma-2-2b has 26 layers, whose times add up: a few of full width measure the ratio on machines too small for all.
python benchmarks/text_prefix.py [--layers=2] [--width=2304] [--prompts=1] [--repeats=7] [--dtype=float32]
"""

import argparse
import statistics
import time

import jax
import numpy as np

from sana_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from sana_jax.prompts import BOUNDARY_TOKENS, MAX_SEQUENCE_LENGTH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=2, help="of the 26 of Gemma-2-2b (default: 2)")
    parser.add_argument(
        "--width", type=int, default=2304, help="hidden size; the MLP is 4 times as wide (default: 2304)"
    )
    parser.add_argument("--instruction_tokens", type=int, default=200, help="of the public one by estimate: 200")
    parser.add_argument("--prompts", type=int, default=1, help="prompts per call (default: 1)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each (default: 7)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    arguments = parser.parse_args()

    config = TextEncoderConfig(
        vocab_size=4096,
        hidden_size=arguments.width,
        num_layers=arguments.layers,
        mlp_dim=4 * arguments.width,
        dtype=arguments.dtype,
    )
    module = TextEncoder(config)
    length = arguments.instruction_tokens + MAX_SEQUENCE_LENGTH - 2
    constant = arguments.instruction_tokens - BOUNDARY_TOKENS
    rng = np.random.default_rng(0)
    ids = rng.integers(5, config.vocab_size, (arguments.prompts, length)).astype(np.int32)
    ids[:, :constant] = ids[0, :constant]
    mask = (np.arange(length) < arguments.instruction_tokens + 40).astype(np.int32) * np.ones_like(ids)
    params = jax.jit(module.init)(jax.random.key(0), ids[:1, :2], mask[:1, :2])["params"]
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)

    @jax.jit
    def plain(params):
        return module.apply({"params": params}, ids, mask)[:, 1 - MAX_SEQUENCE_LENGTH :]

    @jax.jit
    def cached(params, prefix):
        return module.apply({"params": params}, ids[:, constant:], mask[:, constant:], prefix)[
            :, 1 - MAX_SEQUENCE_LENGTH :
        ]

    prefix = jax.jit(lambda params: module.apply({"params": params}, ids[0, :constant], method="encode_prefix"))(params)
    valid = mask[:, 1 - MAX_SEQUENCE_LENGTH :] != 0
    expected, found = (np.asarray(x, np.float32)[valid] for x in (plain(params), cached(params, prefix)))
    error = np.abs(expected - found).max() / np.abs(expected).max()

    seconds = {"plain": [], "cached": []}
    for _ in range(arguments.repeats):
        for name, run in (("plain", lambda: plain(params)), ("cached", lambda: cached(params, prefix))):
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    device = jax.devices()[0].device_kind
    print(
        f"{arguments.layers} of 26 layers, width {arguments.width}, {arguments.dtype}, {arguments.prompts} prompts of "
        f"{length} tokens, {constant} of them cached, on {device}: plain {1e3 * medians['plain']:.1f} ms, cached "
        f"{1e3 * medians['cached']:.1f} ms ({medians['plain'] / medians['cached']:.2f} times faster); largest relative "
        f"difference {error:.1e}"
    )


if __name__ == "__main__":
    main()
