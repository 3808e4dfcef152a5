"""Analytic operations of the models: what MFU is measured with.

Counted are the multiply-adds of dense layers, convolutions and attention, two operations each, as the formulas ask for
them; norms, activations and sums are not. What rematerialisation computes again is no model operation and is not counted
either. (XLA's `cost_analysis` counts the body of a scan once, and what it counts depends on the backend.)

Every function is of one picture. A training step costs forward, and twice that backward, of what trains; forward alone of
what is frozen: `training_flops`.
"""

from sana_jax.models.autoencoder import AutoencoderConfig
from sana_jax.models.conditioning import FREQUENCY_CHANNELS
from sana_jax.models.text_encoder import TextEncoderConfig
from sana_jax.models.transformer import TransformerConfig


def training_flops(*, trained: int = 0, passed: int = 0, frozen: int = 0) -> int:
    """Of forward counts, what a training step costs: every product of the forward pass has two in the backward pass.

    What is `passed` has one there: it does not train, and what trains stands before or within it.
    """
    return 3 * trained + 2 * passed + frozen


def transformer_flops(config: TransformerConfig, height: int, width: int, text_length: int) -> int:
    """One velocity on a latent grid of height x width with `text_length` text tokens, padding included."""
    c, d = config, config.width
    tokens, hidden = height * width // c.patch_size**2, int(c.mlp_ratio * c.width)
    if c.self_attention == "linear":
        attention = 2 * tokens * d * (c.attention_head_dim + 1)  # the state of [d, d + 1] a head, and its application
    else:
        attention = 2 * tokens * tokens * d
    attention += 4 * tokens * d * d
    cross = 2 * tokens * d * d + 2 * text_length * d * d + 2 * tokens * text_length * d
    if c.feed_forward == "mix_ffn":
        feed_forward = tokens * (2 * hidden * d + 9 * 2 * hidden + hidden * d)
    else:
        feed_forward = 2 * tokens * hidden * d
    embeddings = 2 if c.guidance_embeds else 1
    around = (
        tokens * c.patch_size**2 * (c.in_channels + c.out_channels) * d
        + embeddings * (FREQUENCY_CHANNELS * d + d * d)
        + 6 * d * d
        + text_length * (c.caption_channels * d + d * d)
    )
    return 2 * (c.num_layers * (attention + cross + feed_forward) + around)


def text_encoder_flops(config: TextEncoderConfig, length: int, prefix: int = 0) -> int:
    """Hidden states of `length` tokens, padding and masked scores included; the embedding is a look-up.

    `prefix`: tokens before them that were encoded earlier, and are only attended to.
    """
    c = config
    projections = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim * c.hidden_size
    products = 2 * (prefix + length) * c.num_heads * c.head_dim
    return 2 * c.num_layers * length * (projections + products + 3 * c.mlp_dim * c.hidden_size)


def encoder_flops(config: AutoencoderConfig, height: int, width: int) -> int:
    """Latents of a picture of height x width pixels."""
    c, widths = config, config.encoder_block_out_channels
    pixels, last = height * width, len(widths) - 1
    if c.encoder_layers_per_block[0]:
        total = 9 * pixels * c.in_channels * widths[0]
    else:
        total = _resample(pixels // 4, c.in_channels, widths[1])
    for stage, count in enumerate(c.encoder_layers_per_block):
        grid = pixels // 4**stage
        total += count * _block(c, "encoder", stage, grid)
        if count and stage < last:
            total += _resample(grid // 4, widths[stage], widths[stage + 1])
    return 2 * (total + 9 * (pixels // 4**last) * widths[last] * c.latent_channels)


def decoder_flops(config: AutoencoderConfig, height: int, width: int) -> int:
    """The picture of height x width pixels of its latents."""
    c, widths = config, config.decoder_block_out_channels
    pixels, last = height * width, len(widths) - 1
    total = 9 * (pixels // 4**last) * c.latent_channels * widths[last]
    for stage, count in enumerate(c.decoder_layers_per_block):
        grid = pixels // 4**stage
        total += count * _block(c, "decoder", stage, grid)
        if count and stage < last:
            total += _resample(grid, widths[stage + 1], widths[stage])
    finest = 0 if c.decoder_layers_per_block[0] else 1
    return 2 * (total + 9 * pixels * widths[finest] * c.in_channels)


def _resample(grid: int, inputs: int, outputs: int) -> int:
    """Multiply-adds of a Down or Up block whose result has `grid` pixels.

    Convolving before the (un)shuffle costs the same as a stride of 2 or the interpolated grid: four times the pixels and a
    quarter of the channels, or the reverse.
    """
    return 9 * grid * inputs * outputs


def _block(c: AutoencoderConfig, side: str, stage: int, grid: int) -> int:
    """Multiply-adds of one block on `grid` pixels."""
    width = getattr(c, f"{side}_block_out_channels")[stage]
    if getattr(c, f"{side}_block_types")[stage] == "ResBlock":
        return 2 * 9 * grid * width * width
    scales, head = getattr(c, f"{side}_qkv_multiscales")[stage], c.attention_head_dim
    inner = (1 + len(scales)) * width
    projections = 3 * width * width + sum(3 * width * (size**2 + head) for size in scales) + inner * width
    expansion = 4 * width
    feed_forward = 2 * expansion * width + 9 * 2 * expansion + expansion * width
    return grid * (projections + 2 * inner * (head + 1) + feed_forward)
