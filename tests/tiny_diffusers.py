"""The tiny model of `tiny_pipeline` built and run by diffusers: random non-zero values in every parameter."""

import json

import diffusers
import numpy as np
import torch
import transformers
from tiny_pipeline import AUTOENCODER, TEXT_ENCODER, TRANSFORMER, tiny_parts

from sana_jax import tokenizer as tokenizers


def save_tiny(pipeline_class, path, *, transformer=(), autoencoder=(), own=(), scheduler=None, std=0.1, **arguments):
    """A pipeline of `pipeline_class`, which has saved itself to `path`.

    Args:
      transformer, autoencoder: diffusers options in place of the tiny model's.
      own: what sana_jax.json says.
      scheduler: diffusers scheduler; None: the public DPM settings.
      std: of the parameters.
      **arguments: for `pipeline_class`.
    """
    tokenizers.save(tiny_parts().tokenizer, path / "tokenizer")
    t, e = TRANSFORMER, TEXT_ENCODER
    options = dict(
        sample_size=t["sample_size"],
        in_channels=t["in_channels"],
        out_channels=t["out_channels"],
        num_attention_heads=t["width"] // 32,
        attention_head_dim=32,
        num_layers=t["num_layers"],
        num_cross_attention_heads=t["num_cross_attention_heads"],
        cross_attention_head_dim=t["width"] // t["num_cross_attention_heads"],
        cross_attention_dim=t["width"],
        caption_channels=t["caption_channels"],
    )
    parts = dict(
        transformer=diffusers.SanaTransformer2DModel(**options | dict(transformer)),
        vae=diffusers.AutoencoderDC(**AUTOENCODER | dict(autoencoder)),
        text_encoder=transformers.Gemma2Model(
            transformers.Gemma2Config(
                vocab_size=e["vocab_size"],
                hidden_size=e["hidden_size"],
                num_hidden_layers=e["num_layers"],
                num_attention_heads=e["num_heads"],
                num_key_value_heads=e["num_kv_heads"],
                head_dim=e["head_dim"],
                intermediate_size=e["mlp_dim"],
                sliding_window=e["sliding_window"],
                query_pre_attn_scalar=e["query_pre_attn_scalar"],
                attn_implementation="eager",  # SDPA drops the soft-cap
            )
        ),
    )
    torch.manual_seed(0)
    for module in parts.values():
        module.eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(std * torch.randn(parameter.shape))
    if scheduler is None:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    pipe = pipeline_class(
        tokenizer=transformers.AutoTokenizer.from_pretrained(path / "tokenizer"),
        scheduler=scheduler,
        **parts,
        **arguments,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(path)
    (path / "sana_jax.json").write_text(json.dumps(dict(own)))
    return pipe


def draw(pipe, prompts, noise, output_type="latent", **arguments):
    """What `pipe` draws from our noise [B, h, w, c], at the noise's size; latents come back in that layout."""
    height, width = (side * pipe.vae_scale_factor for side in noise.shape[1:3])
    arguments = {"latents": torch.from_numpy(np.asarray(noise).transpose(0, 3, 1, 2).copy()), **arguments}
    size = dict(height=height, width=width, use_resolution_binning=False)
    out = pipe(prompts, output_type=output_type, **size, **arguments).images
    return out.numpy().transpose(0, 2, 3, 1) if output_type == "latent" else out


def allow_any_size(monkeypatch, *pipeline_classes):
    """diffusers insists on multiples of 32 pixels, whatever the autoencoder's factor."""
    for pipeline_class in pipeline_classes:
        monkeypatch.setattr(pipeline_class, "check_inputs", lambda *args, **kwargs: None)
