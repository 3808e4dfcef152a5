"""diffusers' and transformers' counterparts of `tiny_pipeline`, with random non-zero values in every parameter."""

import diffusers
import torch
import transformers
from tiny_pipeline import AUTOENCODER, TEXT_ENCODER, TRANSFORMER, tiny_parts

from sana_jax import tokenizer as tokenizers


def random_parts(path, **transformer_options) -> dict:
    """The components of a pipeline but its scheduler; the tokenizer is written below `path` and read from there."""
    tokenizers.save(tiny_parts().tokenizer, path / "tokenizer")
    t, e = TRANSFORMER, TEXT_ENCODER
    transformer = diffusers.SanaTransformer2DModel(
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
        **transformer_options,
    )
    text_encoder = transformers.Gemma2Model(
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
    )
    vae = diffusers.AutoencoderDC(**AUTOENCODER)
    torch.manual_seed(0)
    for module in (transformer, vae, text_encoder):
        module.eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path / "tokenizer")
    return dict(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer)
