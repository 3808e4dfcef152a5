"""Linear attention, the Mix-FFN's middle and a training step on a GPU, ours and PyTorch's, for `gpu_session.py layers`.

bfloat16 arrays, random. `gigabytes_per_second` counts what must be moved at least, every input read and every result written once
(with the backward pass: both passes'), over the seconds; the card's own rate is in `gpu_session.py time`. PyTorch's forms are written
from the same formulas, eager and with `torch.compile`, convolutions channels-last; its training step is diffusers' transformer
under autocast with fused AdamW. The peer has a process of its own; see `gpu_pictures.py`.

Ours come as XLA's operations (`xla`) and as Mosaic's kernels (`pallas_gpu`). Linear attention runs in the kernels; the Mix-FFN's wait
to be timed here.
"""

import functools
import json
import math
import os
import re
import statistics
import sys
import time

import gpu_models
import gpu_pictures

# Batch, side of the token grid.
GRIDS = ((16, 32), (1, 128))
WIDTH, HEAD_DIM, RATIO = 2240, 32, 2.5
WAYS = ("xla", "pallas_gpu")
# Of arrays of their own, and of one array, as in the model.
ATTENTION, STACKED = "linear attention", "linear attention of stacked q, k, v"
MIDDLE = "Mix-FFN's middle"


def shapes(tiny: bool) -> list[tuple[str, tuple[int, ...]]]:
    """(layer, shape of its arrays)."""
    width = 64 if tiny else WIDTH
    found = []
    for batch, side in ((2, 8),) if tiny else GRIDS:
        found += [(layer, (batch, side * side, width)) for layer in (ATTENTION, STACKED)]
        found.append((MIDDLE, (batch, side, side, int(RATIO * width))))
    return found


def least_bytes(layer: str, shape: tuple[int, ...], backward: bool) -> int:
    """Of arrays of two bytes: (inputs and result, then inputs, the result's gradient and the inputs' gradients)."""
    inputs = 3 if layer in (ATTENTION, STACKED) else 2
    arrays = inputs + 1 + (2 * inputs + 1 if backward else 0)
    return 2 * arrays * math.prod(shape)


def rows(name: str, tiny: bool, seconds_of, only: str = ""):
    """A row a layer and pass, whose seconds `seconds_of(layer, shape, backward)` gives; an error is a row too."""
    for layer, shape in shapes(tiny):
        for backward in (False, True):
            title = f"{name}: {layer}, {list(shape)}, {'forward and backward' if backward else 'forward'}"
            if not re.search(only, title):
                continue
            try:
                seconds = seconds_of(layer, shape, backward)
            except Exception as error:  # noqa: BLE001 - reported as the result
                yield {"name": title, "error": f"{type(error).__name__}: {error}"[:1000]}
                continue
            rate = least_bytes(layer, shape, backward) / seconds / 1e9
            yield {"name": title, "seconds": seconds, "gigabytes_per_second": rate}


# Ours


def measure_ours(report, tiny: bool, only: str = "") -> None:
    for way in WAYS:
        for row in rows(f"sana_jax {way}", tiny, functools.partial(_our_seconds, way), only):
            report.add(**row)
    for model in gpu_models.TRAINED:
        name = f"sana_jax: training step of {model}"
        if re.search(only, name):
            gpu_models.guarded(report, name, functools.partial(gpu_models.measure_step, model, tiny, report))


def our_form(way: str, layer: str, shape: tuple[int, ...]):
    """A function of the layer's inputs: q, k and v; or of one array that its parts are taken of, as one product makes them."""
    import jax
    import jax.numpy as jnp
    from sana_jax.kernels.glu_mbconv.api import gated_depthwise
    from sana_jax.kernels.linear_attention.api import linear_attention

    attend = functools.partial(linear_attention, head_dim=HEAD_DIM, implementation=way)
    if layer == ATTENTION:
        return attend
    if layer == STACKED:
        return lambda qkv: attend(*jnp.split(qkv, 3, axis=-1), stacked=True)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 2 * shape[-1]), jnp.bfloat16)
    bias = jnp.ones(2 * shape[-1], jnp.bfloat16)

    def middle(both):
        flat = jnp.split(both.reshape(shape[0], -1, 2 * shape[-1]), 2, axis=-1)
        return gated_depthwise(*(x.reshape(shape) for x in flat), kernel, bias, implementation=way)

    return middle


def both_passes(forward):
    """The function that is given the result's gradient first, and returns the result and the inputs' gradients."""
    import jax

    def both(g, *inputs):
        y, vjp = jax.vjp(forward, *inputs)
        return y, vjp(g)

    return both


def _our_seconds(way: str, layer: str, shape: tuple[int, ...], backward: bool) -> float:
    import jax
    import jax.numpy as jnp

    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4)]
    inputs = arrays[: 2 if layer == MIDDLE else 3]
    if layer != ATTENTION:
        inputs = [jnp.concatenate(inputs, axis=-1)]
    forward = our_form(way, layer, shape)
    run = jax.jit(both_passes(forward) if backward else forward)
    given = (arrays[3], *inputs) if backward else tuple(inputs)
    jax.block_until_ready(run(*given))
    return gpu_models.median_of_queues(lambda: run(*given), jax.block_until_ready)


# The peer, in its own process


def _peers(tiny: bool, only: str) -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for way in ("eager", "torch.compile"):
        for row in rows(f"PyTorch {way}", tiny, functools.partial(_their_seconds, way, device), only):
            print(json.dumps(row), flush=True)
        for model in gpu_models.TRAINED:
            row = {"name": f"PyTorch {way}: training step of {model}"}
            if not re.search(only, row["name"]):
                continue
            try:
                row = _their_training(way, model, device, tiny)
            except Exception as error:  # noqa: BLE001 - reported as the result
                row["error"] = f"{type(error).__name__}: {error}"[:1000]
            print(json.dumps(row), flush=True)


def _their_seconds(way: str, device: str, layer: str, shape: tuple[int, ...], backward: bool) -> float:
    import torch
    from torch.nn import functional

    made = torch.Generator(device).manual_seed(0)

    def array(*shape):
        return torch.randn(shape, generator=made, device=device, dtype=torch.bfloat16)

    if layer in (ATTENTION, STACKED):
        inputs = [array(*shape) for _ in range(3)]
        if layer == STACKED:
            inputs = [torch.cat(inputs, -1)]

        def forward(*inputs):
            q, k, v = inputs[0].chunk(3, -1) if len(inputs) == 1 else inputs
            q, k, v = (x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2).float() for x in (q, k, v))
            q, k = q.relu(), k.relu()
            total = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
            y = q @ (k.transpose(2, 3) @ v) / (total + 1e-15)
            return y.to(torch.bfloat16).transpose(1, 2).flatten(2)

    else:
        channels = 2 * shape[-1]
        inputs = [array(shape[0], channels, *shape[1:3]).contiguous(memory_format=torch.channels_last)]
        kernel, bias = array(channels, 1, 3, 3), array(channels)

        def forward(both):
            convolved = functional.conv2d(functional.silu(both), kernel, bias, padding=1, groups=channels)
            value, gate = convolved.chunk(2, 1)
            return value * functional.silu(gate)

    if way == "torch.compile":
        forward = torch.compile(forward)
    if backward:
        for x in inputs:
            x.requires_grad_()
        gradient = torch.randn_like(forward(*inputs))

    def call():
        y = forward(*inputs)
        if backward:
            torch.autograd.grad(y, inputs, gradient)

    call()
    return gpu_models.median_of_queues(call, lambda _: torch.cuda.synchronize() if device == "cuda" else None)


def _their_training(way: str, name: str, device: str, tiny: bool) -> dict:
    """As `gpu_models.measure_step`: on given latents and text features."""
    import diffusers
    import torch

    from sana_jax.weights.transformer import config_to_json

    config, batch = gpu_models.trained(name, tiny)
    with torch.device(device):
        model = diffusers.SanaTransformer2DModel.from_config(config_to_json(config)).train()
        latents = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size)
        text, mask = torch.randn(batch, 300, config.caption_channels), torch.ones(batch, 300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if way == "torch.compile":
        model.compile()

    def step():
        noise = torch.randn_like(latents)
        sigma = torch.rand(batch, 1, 1, 1, device=device)
        with torch.autocast(device, torch.bfloat16):
            velocity = model(
                (1 - sigma) * latents + sigma * noise,
                encoder_hidden_states=text,
                timestep=1000 * sigma.flatten(),
                encoder_attention_mask=mask,
            ).sample
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(velocity.float(), noise - latents).backward()
        optimizer.step()

    seconds = _their_median(step, device, 7)
    title = f"PyTorch {way}: training step of {name}, autocast bf16, AdamW, batch {batch}"
    return {"name": title, "seconds": seconds, "images_per_second": batch / seconds}


def _their_median(call, device: str, repeats: int) -> float:
    """Seconds of a call, without the first two, which compile and choose algorithms."""
    import torch

    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    _peers(**gpu_pictures.arguments())
