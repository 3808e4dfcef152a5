"""Whole pictures on a GPU, ours and diffusers', for `gpu_session.py`: prompt to pixels, random weights of the public sizes.

Ours is `SanaPipeline` as a user calls it, the peer diffusers' `SanaPipeline`, eager and with `torch.compile` (its default mode,
shapes fixed) of its transformer and decoder. Both are bfloat16, draw 20 steps guided by 4.5, encode 300 tokens with a Gemma-2-2b and no instruction before the prompt.
What the weights are does not matter to the time. The peer has a process of its own, because the two libraries would not share
the GPU's memory; machine and card are the same, and the peer is timed before and after ours.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import time

STEPS, GUIDANCE = 20, 4.5
# Name -> preset of the transformer, side in pixels, pictures of a call. Most valuable first.
CALLS = {
    "1.6B 1024, 1 picture": ("sana_1600m", 1024, 1),
    "1.6B 1024, 16 pictures": ("sana_1600m", 1024, 16),
    "0.6B 1024, 1 picture": ("sana_600m", 1024, 1),
    "0.6B 1024, 16 pictures": ("sana_600m", 1024, 16),
    "1.6B 2048, 1 picture": ("sana_1600m", 2048, 1),
    "1.6B 4096, 1 picture": ("sana_1600m", 4096, 1),
}
# Ways of ours to calculate: name -> (quantisation, whether the Mix-FFN's kernel is asked for). Of most calls only the first.
WAYS = {
    "bf16": (None, False),
    "bf16 and the Mix-FFN's kernel": (None, True),
    "fp8": ("fp8", False),
    "int8": ("int8", False),
}
IN_ALL_WAYS = ("1.6B 1024, 1 picture", "1.6B 1024, 16 pictures")
TINY_CALLS = {"tiny 64, 2 pictures": ("sana_600m", 64, 2)}


def calls(tiny: bool) -> dict[str, tuple[str, int, int]]:
    return TINY_CALLS if tiny else CALLS


def configs(preset: str, pixels: int, tiny: bool) -> tuple:
    """Of transformer, autoencoder and text encoder."""
    from sana_jax.models import presets

    shrunk = {"num_layers": 2, "width": 224, "num_cross_attention_heads": 7} if tiny else {}
    transformer = getattr(presets, preset)(max(pixels // 32, 1), **shrunk)
    autoencoder, text_encoder = presets.dc_ae_f32c32_sana_1_1(), presets.gemma2_2b()
    if tiny:
        text_encoder = presets.gemma2_2b(
            vocab_size=8192, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, mlp_dim=128
        )
        transformer = dataclasses.replace(transformer, caption_channels=64)
        narrow = (32, 32, 32, 32, 64, 64)
        autoencoder = dataclasses.replace(
            autoencoder, encoder_block_out_channels=narrow, decoder_block_out_channels=narrow
        )
    return transformer, autoencoder, text_encoder


def measure_ours(report, tiny: bool, only: str = "") -> None:
    """One row a call; an error is a row too, and costs the others nothing."""
    for call, values in calls(tiny).items():
        for way, chosen in WAYS.items():
            name = f"sana_jax: {call}, {way}"
            if not re.search(only, name) or way != "bf16" and call not in (*IN_ALL_WAYS, *TINY_CALLS):
                continue
            try:
                report.add(name=name, **_measure_call(*values, *chosen, tiny))
            except Exception as error:  # noqa: BLE001 - reported as the result
                report.add(name=name, error=f"{type(error).__name__}: {error}"[:1000])


def _measure_call(preset: str, pixels: int, batch: int, quantization: str | None, kernel: bool, tiny: bool) -> dict:
    import jax

    from sana_jax import flops

    transformer, *others = configs(preset, pixels, tiny)
    if kernel:
        transformer = dataclasses.replace(transformer, feed_forward_implementation="pallas_gpu")
    pipe = our_pipeline((transformer, *others), quantization)
    seconds, compilation = timed(functools.partial(draw, pipe, pixels, batch))
    side = pixels // 32
    evaluation = 2 * STEPS * flops.transformer_flops(pipe.transformer.config, side, side, 300)
    each = evaluation + flops.decoder_flops(pipe.autoencoder.config, pixels, pixels)
    each += flops.text_encoder_flops(pipe.text_encoder.config, 300)
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "seconds": seconds,
        "pictures_per_second": batch / seconds,
        "tflops": batch * each / seconds / 1e12,
        "compilation_seconds": compilation,
        "peak_gib_so_far": memory.get("peak_bytes_in_use", 0) / 2**30,
    }


def draw(pipe, pixels: int, batch: int, **others):
    """One call of either pipeline."""
    return pipe(
        ["a picture"] * batch,
        height=pixels,
        width=pixels,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        use_resolution_binning=False,
        output_type="np",
        **others,
    )


def our_pipeline(of: tuple, quantization: str | None):
    """A pipeline with random weights, bfloat16 where they are not quantised, made on the device."""
    import jax
    import jax.numpy as jnp

    from sana_jax import SanaPipeline
    from sana_jax import tokenizer as tokenizers
    from sana_jax.models.autoencoder import Autoencoder
    from sana_jax.models.text_encoder import TextEncoder
    from sana_jax.models.transformer import SanaTransformer
    from sana_jax.quantization import quantize_transformer
    from sana_jax.weights.folder import PipelineParts, SamplingDefaults, abstract_params
    from sana_jax.weights.model_index import EMBEDDED_MODEL

    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    parts = []
    for kind, config in zip((SanaTransformer, Autoencoder, TextEncoder), of, strict=True):
        module = kind(dataclasses.replace(config, dtype="bfloat16"))
        leaves, tree = jax.tree.flatten(abstract_params(module))
        keys = jax.random.split(jax.random.key(0), len(leaves))
        parts.append((module, tree.unflatten([draw(key, x.shape) for key, x in zip(keys, leaves, strict=True)])))
    if quantization is not None:
        module, params = parts[0]
        parts[0] = module, quantize_transformer(params, quantization)
    defaults = SamplingDefaults(complex_human_instruction=None)
    return SanaPipeline(PipelineParts(*parts, tokenizers.load(EMBEDDED_MODEL), defaults))


def measure_peers(report, tiny: bool, only: str = "", file: str = __file__) -> None:
    """Runs a file of peers as a process that has the GPU to itself; every line of JSON that it prints is a row."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, file, f"--only={only}", *["--tiny"] * tiny]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("{"):
            report.add(**json.loads(line))
    if process.wait():
        report.add(name="diffusers", error=f"exit code {process.returncode}; see the output")


def arguments() -> dict:
    """Of a process of peers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="")
    return vars(parser.parse_args())


def _peers(tiny: bool, only: str) -> None:
    """Every model eager first and then compiled."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = dict.fromkeys((preset, pixels) for preset, pixels, _ in calls(tiny).values())
    for preset, pixels in models:
        pipe = None
        for way in ("eager", "torch.compile"):
            compiled = way == "eager"
            for name, (*model, batch) in calls(tiny).items():
                row = {"name": f"diffusers {way}: {name}, bf16"}
                if tuple(model) != (preset, pixels) or not re.search(only, row["name"]):
                    continue
                try:
                    pipe = pipe or _their_pipeline(configs(preset, pixels, tiny), device)
                    if not compiled:
                        pipe.transformer.compile(dynamic=False)
                        pipe.vae.decoder.compile(dynamic=False)
                        compiled = True
                    row |= _measure_peer(pipe, pixels, batch, device)
                except Exception as error:  # noqa: BLE001 - reported as the result
                    row["error"] = f"{type(error).__name__}: {error}"[:1000]
                print(json.dumps(row), flush=True)


def _measure_peer(pipe, pixels: int, batch: int, device: str) -> dict:
    import torch

    seconds, first = timed(functools.partial(draw, pipe, pixels, batch, complex_human_instruction=None))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "seconds": seconds,
        "pictures_per_second": batch / seconds,
        "first_call_seconds": first,
        "peak_gib_so_far": peak / 2**30,
    }


def _their_pipeline(of: tuple, device: str):
    import diffusers
    import torch
    import transformers

    from sana_jax.weights import autoencoder as autoencoder_weights
    from sana_jax.weights import text_encoder as text_encoder_weights
    from sana_jax.weights import transformer as transformer_weights
    from sana_jax.weights.model_index import EMBEDDED_MODEL

    transformer, autoencoder, text_encoder = of
    text = dict(text_encoder_weights.config_to_json(text_encoder)) | {"attn_implementation": "eager"}
    with torch.device(device):
        parts = {
            "transformer": diffusers.SanaTransformer2DModel.from_config(
                transformer_weights.config_to_json(transformer)
            ),
            "vae": diffusers.AutoencoderDC.from_config(autoencoder_weights.config_to_json(autoencoder)),
            "text_encoder": transformers.Gemma2Model(transformers.Gemma2Config(**text)),
        }
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # which a CPU may take minutes for
    pipe = diffusers.SanaPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL / "tokenizer"),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **{name: part.to(device, dtype).eval() for name, part in parts.items()},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def timed(draw, repeats: int = 5, enough: float = 12.0) -> tuple[float, float]:
    """(median seconds of a call, seconds of the first one); pictures are on the host when a call returns.

    There are fewer repeats where they have taken `enough` seconds: three are.
    """
    times = []
    while len(times) <= repeats and (len(times) <= 3 or sum(times[1:]) < enough):
        began = time.perf_counter()
        draw()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), times[0]


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    _peers(**arguments())
