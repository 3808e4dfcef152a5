"""Beside diffusers and transformers on this CPU: the same weights, the same inputs, one after the other.

    python benchmarks/cpu_peers.py                   # all rows, 15 to 45 minutes on 2 cores; leave the machine alone meanwhile
    python benchmarks/cpu_peers.py --only=decode     # the rows whose name contains a text
    python benchmarks/cpu_peers.py --tiny            # small models, to try the script; writes nothing
    python benchmarks/cpu_peers.py --print           # the table of what is there

Needs the `parity` extra. Every row is a process of its own, with as many threads on both sides as there are cores. Weights are
random, ours read from the peer's; outputs are compared before anything is timed. Then the sides take turns of two calls, and the
median of the second ones is taken: in use evaluations and steps follow one another, and a first call's time depends on what
became of its memory during the other side's turn. `floor` is what the row's products take at the best rate that a large matrix
product of the row's dtype reached here, on either side, in the same process; what a row takes beyond it goes to smaller products,
depthwise convolutions, norms and activations. Rows are written to benchmarks/results/cpu_peers.json, or on another machine to
`--result`, one by one, in place of earlier ones.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from provenance import ROOT, commit, machine, versions

RESULT = ROOT / "benchmarks" / "results" / "cpu_peers.json"
PACKAGES = ("jax", "torch", "diffusers", "transformers")
MOST_DIFFERENT = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.1}  # of the outputs, over their range


class Sides(NamedTuple):
    """One row, ready to run.

    Attributes:
      ours, theirs: do the work once and return the result in one layout (a step: [0, loss]).
      flops: of one call, by `sana_jax.flops`.
      dtype: of both; "int8" are our products beside a peer in bfloat16.
    """

    ours: Callable
    theirs: Callable
    flops: int
    dtype: str = "float32"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="text that a row's name contains")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    parser.add_argument("--result", type=pathlib.Path, default=RESULT, help="file of the rows (default: %(default)s)")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(ROWS[arguments.row](arguments.tiny), arguments.repeats)))
        return 0
    if arguments.repeats < 1:
        parser.error(f"--repeats={arguments.repeats}: at least one turn is measured")
    if arguments.print and not arguments.result.is_file():
        parser.error(f"--result={arguments.result}: no such file to print")
    names = [name for name in ROWS if arguments.only in name]
    if not names:
        parser.error(f"--only={arguments.only}: in none of {'; '.join(ROWS)}")
    known = arguments.result.is_file() and not arguments.tiny
    found = json.loads(arguments.result.read_text())["rows"] if known else {}
    for name in [] if arguments.print else names:
        print(name, file=sys.stderr, flush=True)
        command = [sys.executable, __file__, f"--row={name}", f"--repeats={arguments.repeats}"]
        command += ["--tiny"] if arguments.tiny else []
        # OpenMP's idle threads would spin on the cores that the other side works on.
        environment = {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        environment = os.environ | environment | ENVIRONMENTS.get(name, {})
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = {"commit": commit()} | json.loads(run.stdout.splitlines()[-1])
        if not arguments.tiny:
            write(found, arguments.result)
    print(table({name: found[name] for name in ROWS if name in found}))
    return 0


def measure(sides: Sides, repeats: int) -> dict:
    """Seconds of both sides, each the second call of a turn, after one call each whose results are compared."""
    import numpy as np

    ours, theirs = (np.asarray(run(), np.float32) for run in (sides.ours, sides.theirs))
    difference = float(np.abs(ours - theirs).max() / np.ptp(theirs))
    if not difference < MOST_DIFFERENT[sides.dtype]:
        raise SystemExit(f"the outputs differ by {difference:.1e} of their range")
    times = {"ours": [], "theirs": []}
    for _ in range(repeats):
        for side, run in (("ours", sides.ours), ("theirs", sides.theirs)):
            time.sleep(0.2)  # the other side's threads go to sleep
            # On a virtual machine the page faults of our training step took the system 5 to 8 s right after a step of the peer, and
            # 1.2 s after one of ours (as many faults; time in between makes no difference).
            run()
            began = time.perf_counter()
            run()
            times[side].append(time.perf_counter() - began)
    seconds = {side: statistics.median(values) for side, values in times.items()}
    rates = matmul_rates(sides.dtype)
    return {
        "seconds": seconds,
        "all seconds": times,
        "ratio": seconds["theirs"] / seconds["ours"],
        "floor": sides.flops / max(rates.values()),
        "flops": sides.flops,
        "matmul flops a second": rates,
        "difference": difference,
        "dtype": sides.dtype,
        "versions": versions(*PACKAGES),
        "machine": machine(),
    }


def matmul_rates(dtype: str, side: int = 2048) -> dict[str, float]:
    """The best of seven products of this side, by library; PyTorch multiplies integers without a library."""
    import jax.numpy as jnp
    import torch

    integer = dtype == "int8"
    a = (32 * torch.randn(side, side)).to(torch_dtype(dtype))
    x = jnp.asarray(a.float().numpy(), dtype)
    product = compiled(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.int32 if integer else jnp.float32))
    rates = {}
    products = {"jax": lambda: product(x).block_until_ready()} | ({} if integer else {"torch": lambda: a @ a})
    for name, run in products.items():
        times = []
        for _ in range(8):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        rates[name] = 2 * side**3 / min(times[1:])
    return rates


# Rows


def transformer(preset: str, sample_size: int, dtype: str = "float32", int8: bool = False) -> Callable[[bool], Sides]:
    """A guided evaluation: two pictures, 300 text tokens; with `int8` our large products are made of such codes."""

    def build(tiny: bool) -> Sides:
        import diffusers
        import jax
        from random_models import computing_in, randomised, their_velocity, transformer_inputs

        from sana_jax import flops
        from sana_jax.models import presets
        from sana_jax.models.layers import take_apart
        from sana_jax.models.transformer import SanaTransformer
        from sana_jax.quantization import quantize_transformer
        from sana_jax.weights import transformer as weights

        shrunk = {"num_layers": 2, "width": 224, "num_cross_attention_heads": 7} if tiny else {}
        config = getattr(presets, preset)(sample_size, **shrunk)
        theirs = randomised(diffusers.SanaTransformer2DModel.from_config, weights.config_to_json(config))
        module = computing_in(SanaTransformer(config), dtype)
        params = in_dtype(our_params(weights.entries(config), theirs, module), dtype)
        params = take_apart(quantize_transformer(params, "int8") if int8 else params)
        inputs = transformer_inputs(config, sample_size, sample_size, text_lengths=(300, 300))
        peer_dtype = torch_dtype(dtype)
        theirs.to(peer_dtype)
        run = compiled(lambda params: module.apply({"params": params}, **inputs))
        return Sides(
            lambda: jax.block_until_ready(run(params)),
            lambda: their_velocity(theirs, config, inputs, peer_dtype),
            2 * flops.transformer_flops(config, sample_size, sample_size, 300),
            "int8" if int8 else dtype,
        )

    return build


def autoencoder(method: str, pixels: int = 512) -> Callable[[bool], Sides]:
    """DC-AE f32c32 sana-1.1 on one picture."""

    def build(tiny: bool) -> Sides:
        import diffusers
        import jax
        import numpy as np
        import torch
        from random_models import nchw, nhwc, randomised

        from sana_jax import flops
        from sana_jax.models import presets
        from sana_jax.models.autoencoder import Autoencoder
        from sana_jax.weights import autoencoder as weights

        side = 64 if tiny else pixels
        config = presets.dc_ae_f32c32_sana_1_1()
        theirs = randomised(diffusers.AutoencoderDC.from_config, weights.config_to_json(config))
        module = Autoencoder(config)
        params = our_params(weights.entries(config), theirs, module)
        rng = np.random.default_rng(0)
        shape = (1, side, side, 3) if method == "encode" else (1, side // 32, side // 32, 32)
        x = rng.standard_normal(shape).astype(np.float32)
        run = compiled(lambda params: module.apply({"params": params}, x, method=method))

        @torch.no_grad()
        def their_result():
            return nhwc(theirs.encode(nchw(x)).latent if method == "encode" else theirs.decode(nchw(x)).sample)

        count = flops.encoder_flops if method == "encode" else flops.decoder_flops
        return Sides(lambda: jax.block_until_ready(run(params)), their_result, count(config, side, side))

    return build


def text_encoder(layers: int) -> Callable[[bool], Sides]:
    """Gemma-2-2b's hidden states of a prompt of 300 tokens, with the first layers alone: two whole ones take 21 GB."""

    def build(tiny: bool) -> Sides:
        import jax
        import numpy as np
        import torch
        import transformers
        from random_models import randomised

        from sana_jax import flops
        from sana_jax.models.layers import take_apart
        from sana_jax.models.text_encoder import TextEncoder
        from sana_jax.weights import text_encoder as weights

        small = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 1000} if tiny else {}
        config = transformers.Gemma2Config(
            num_hidden_layers=2 if tiny else layers, attn_implementation="eager", **small
        )
        theirs = randomised(transformers.Gemma2Model, config)
        module = TextEncoder(weights.config_from_json(json.loads(config.to_json_string())))
        params = take_apart(our_params(weights.entries(module.config), theirs, module))
        ids = np.random.default_rng(0).integers(5, config.vocab_size, (1, 300)).astype(np.int32)
        mask = np.ones_like(ids)
        run = compiled(lambda params: module.apply({"params": params}, ids, mask))

        @torch.no_grad()
        def their_result():
            return theirs(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())[0].numpy()

        count = flops.text_encoder_flops(module.config, 300)
        return Sides(lambda: jax.block_until_ready(run(params)), their_result, count)

    return build


def pipeline(tiny: bool) -> Sides:
    """The embedded model, 20 guided steps, eight pictures."""
    import diffusers
    import numpy as np
    import torch

    from sana_jax import SanaPipeline, flops
    from sana_jax.weights.model_index import EMBEDDED_MODEL

    ours = SanaPipeline.from_pretrained()
    theirs = diffusers.SanaPipeline.from_pretrained(EMBEDDED_MODEL, torch_dtype=torch.float32, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    count, steps = (1, 2) if tiny else (8, 20)
    prompts = ["a red apple, noto style, on a blue background"] * count
    noise = np.random.default_rng(0).normal(size=(count, *ours.latent_shape(64, 64))).astype(np.float32)
    shared = dict(num_inference_steps=steps, guidance_scale=3.0)

    def their_pictures():
        return theirs(
            prompts,
            latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
            height=64,
            width=64,
            use_resolution_binning=False,
            complex_human_instruction=None,
            max_sequence_length=length,
            output_type="np",
            **shared,
        ).images

    length = ours.defaults.max_sequence_length
    side = ours.latent_shape(64, 64)[0]
    one = 2 * steps * flops.transformer_flops(ours.transformer.config, side, side, length)
    one += flops.decoder_flops(ours.autoencoder.config, 64, 64)
    one += flops.text_encoder_flops(ours.text_encoder.config, length)
    return Sides(lambda: ours(prompts, latents=noise, output_type="np", **shared), their_pictures, count * one)


def training_step(tiny: bool) -> Sides:
    """Loss, gradients and AdamW of a transformer of 100 million parameters, eight pictures of 512 pixels."""
    import diffusers
    import jax
    import jax.numpy as jnp
    import optax
    import torch
    from random_models import nchw, randomised, transformer_inputs

    from sana_jax import flops
    from sana_jax.models import presets
    from sana_jax.models.transformer import SanaTransformer
    from sana_jax.weights import transformer as weights

    size = {"width": 224, "num_layers": 2} if tiny else {"width": 768, "num_layers": 9}
    # All blocks in one step of the scan, and buffers are donated, as `configs/emoji.py` and the trainer do.
    size["unroll"] = size["num_layers"]
    config = presets.sana_600m(16, num_cross_attention_heads=size["width"] // 32, **size)
    batch = 2 if tiny else 8
    theirs = randomised(diffusers.SanaTransformer2DModel.from_config, weights.config_to_json(config)).train()
    module = SanaTransformer(config)
    params = jax.tree.map(jnp.array, our_params(weights.entries(config), theirs, module))
    inputs = transformer_inputs(config, 16, 16, text_lengths=(300,) * batch)
    target = inputs["latents"][:, ::-1].copy()
    tx = optax.adamw(1e-4, weight_decay=0.01)

    def loss(params):
        return jnp.mean(jnp.square(module.apply({"params": params}, **inputs) - target))

    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    step = compiled(step, donate_argnums=(0, 1))
    ours = [params, jax.jit(tx.init)(params)]

    def our_step():
        ours[0], ours[1], value = jax.block_until_ready(step(*ours))
        return [0, float(value)]

    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    latents, wanted = nchw(inputs["latents"]), nchw(target)
    text, mask, timesteps = (torch.tensor(inputs[name]) for name in ("text_features", "text_mask", "timesteps"))

    def their_step():
        optimizer.zero_grad()
        kwargs = dict(encoder_hidden_states=text, timestep=timesteps, encoder_attention_mask=mask)
        value = torch.nn.functional.mse_loss(theirs(latents, **kwargs).sample, wanted)
        value.backward()
        optimizer.step()
        return [0, float(value)]

    count = flops.training_flops(trained=flops.transformer_flops(config, 16, 16, 300))
    return Sides(our_step, their_step, batch * count)


ROWS: dict[str, Callable[[bool], Sides]] = {
    "transformer 0.6B at 512, batch 2": transformer("sana_600m", 16),
    "transformer 0.6B at 1024, batch 2": transformer("sana_600m", 32),
    "transformer 1.6B at 512, batch 2": transformer("sana_1600m", 16),
    "transformer 0.6B at 512, batch 2, bfloat16": transformer("sana_600m", 16, "bfloat16"),
    "transformer 0.6B at 1024, batch 2, bfloat16": transformer("sana_600m", 32, "bfloat16"),
    "transformer 0.6B at 1024, batch 2, int8 beside bfloat16": transformer("sana_600m", 32, "bfloat16", int8=True),
    "DC-AE sana-1.1 decode at 512": autoencoder("decode"),
    "DC-AE sana-1.1 encode at 512": autoencoder("encode"),
    "Gemma-2-2b features, 13 of 26 layers": text_encoder(13),
    "embedded model, pipeline, 8 pictures": pipeline,
    "training step, 100M, batch 8 at 512": training_step,
    "training step, 100M, batch 8 at 512, huge pages": training_step,
}
# Of both sides. Results that are new memory in every call cost page faults: 4 KB each, or 2 MB where glibc asks for such pages.
ENVIRONMENTS = {"training step, 100M, batch 8 at 512, huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}


def compiled(function: Callable, **options) -> Callable:
    """As the sampler and training compile for a CPU."""
    import jax

    from sana_jax.compiler_options import compiler_options

    return jax.jit(function, compiler_options=compiler_options("cpu"), **options)


def our_params(entries, theirs, module) -> dict:
    """Our parameters, views of the peer's where the layouts agree; for a peer that is not changed any more."""
    import jax.numpy as jnp

    from sana_jax.weights import layout
    from sana_jax.weights.folder import abstract_params

    def counter(name):
        return name.endswith("num_batches_tracked")

    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    return layout.read(
        entries,
        tensors,
        abstract_params(module),
        ignore=counter,
        place=lambda path, shape, assemble: jnp.array(assemble()).block_until_ready(),
    )


def in_dtype(params: dict, dtype: str) -> dict:
    import jax

    return params if dtype == "float32" else jax.tree.map(lambda x: x.astype(dtype), params)


def torch_dtype(name: str):
    import torch

    return getattr(torch, name)


def write(rows: dict[str, dict], file: pathlib.Path) -> None:
    content = {"what": __doc__.split("\n\n")[0], "rows": {name: rows[name] for name in ROWS if name in rows}}
    file.write_text(json.dumps(content, indent=1) + "\n")


def table(rows: dict[str, dict]) -> str:
    """In Markdown."""
    lines = ["| float32 unless said | ours, s | peer, s | peer / ours | floor, s |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        seconds = row["seconds"]
        cells = (f"{seconds['ours']:.2f}", f"{seconds['theirs']:.2f}", f"{row['ratio']:.2f}", f"{row['floor']:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]
    sys.exit(main())
