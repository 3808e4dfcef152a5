"""Public sizes with random weights in every parameter, for the comparisons at full width and at full size."""

import contextlib
import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

# tests/conftest.py turns LLVM's optimisations off, which long-running programs need.
OPTIMISED = {"xla_backend_optimization_level": 3}
BLOCK = 2**25


@torch.no_grad()
def randomised(make, *args):
    """The model `make(*args)` with random values everywhere, of a size that leaves the activations finite through any depth.

    Every tensor is another window of one block of numbers: drawing a billion of them anew takes half a minute. So does it what
    PyTorch fills them with at first, which is left out.
    """
    drawn = ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_")
    with mock.patch.multiple(torch.nn.init, **dict.fromkeys(drawn, lambda tensor, *_, **__: tensor)):
        model = make(*args)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(BLOCK, generator=generator)
    for name, parameter in model.named_parameters():
        start = int(torch.randint(BLOCK // 2, (), generator=generator))
        window = block[start : start + parameter.numel()]
        if len(window) < parameter.numel():
            window = window.repeat(-(-parameter.numel() // len(window)))[: parameter.numel()]
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        parameter.copy_(window.view(parameter.shape)).mul_(fan_in**-0.5)
        if parameter.ndim == 1 and "norm" in name:
            parameter.add_(1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.3, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@contextlib.contextmanager
def one_thread():
    """PyTorch convolves a small grid of bfloat16 channel by channel; threads that wait for each other at each take a minute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def transformer_inputs(config, height, width, text_lengths, text_tokens=300):
    """A picture for each text length; the rest of its `text_tokens` is masked."""
    rng, batch = np.random.default_rng(1), len(text_lengths)
    inputs = {
        "latents": rng.standard_normal((batch, height, width, config.in_channels)).astype(np.float32),
        "timesteps": np.linspace(749, 3, batch, dtype=np.float32),
        "text_features": rng.standard_normal((batch, text_tokens, config.caption_channels)).astype(np.float32),
        "text_mask": (np.arange(text_tokens) < np.array(text_lengths)[:, None]).astype(np.int32),
    }
    if config.guidance_embeds:
        inputs["guidance"] = np.linspace(4.5, 1, batch, dtype=np.float32)
    return inputs


@torch.no_grad()
def their_velocity(model, config, inputs, dtype=torch.float32):
    kwargs = {}
    if config.guidance_embeds:
        kwargs["guidance"] = torch.tensor(inputs["guidance"]) * config.guidance_embeds_scale
    out = model.to(dtype)(
        torch.tensor(inputs["latents"].transpose(0, 3, 1, 2), dtype=dtype),
        encoder_hidden_states=torch.tensor(inputs["text_features"], dtype=dtype),
        timestep=torch.tensor(inputs["timesteps"]) * config.timestep_scale,
        encoder_attention_mask=torch.tensor(inputs["text_mask"]),
        **kwargs,
    ).sample
    return nhwc(out)


def nchw(x, dtype=torch.float32):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2), dtype=dtype)


def nhwc(x):
    return x.float().numpy().transpose(0, 2, 3, 1)


def computing_in(module, dtype):
    return type(module)(dataclasses.replace(module.config, dtype=dtype))


def rounded(params):
    """As the loader gives them for dtype="bfloat16"."""
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params)


def rounded_more(params):
    """With three bits less than bfloat16 has."""
    return jax.tree.map(lambda x: (x.view(np.uint16) & np.uint16(0xFFF8)).view(x.dtype), rounded(params))
