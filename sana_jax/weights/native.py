"""The diffusion transformer in the layout of the original code's files: key table, and configuration from shapes.

Most of the configuration is in the tensors' names and shapes; the rest has a rule here, or is asked for.
"""

import math
import re
from collections.abc import Mapping

from sana_jax.models.transformer import TransformerConfig
from sana_jax.weights.layout import DEPTHWISE, POINTWISE, SAME, Entry, Form
from sana_jax.weights.native_files import check_fields, shape_of
from sana_jax.weights.transformer import dense_entries, patch_form

# Known tensors that carry nothing for us, and why.
IGNORED = {
    "y_embedder.y_embedding": "text features of the empty prompt, for caption dropout; the text encoder gives them",
    "pos_embed": "a buffer of zeros or of the position table, which is computed for the grid at hand",
    "logvar_linear.weight": "weighs the noise levels in the training loss of Sprint",
    "logvar_linear.bias": "the same",
}
# Heads of the cross-attention leave no trace in the shapes; these are the widths of the original code.
CROSS_ATTENTION_HEADS = {1152: 16, 2240: 20}
# Models trained at these sides of the latent grid (2K, 4K) add a position table; "pe_interpolation" in the original code.
INTERPOLATION_SCALES = {64: 1.0, 128: 2.0}
# Constants of the original code where diffusers has others.
SWITCHES = {"attention_eps": 1e-8, "cross_norm_eps": 1e-6}


def config_from_tensors(tensors: Mapping, **fields) -> TransformerConfig:
    """The configuration of a native state dict.

    From names and shapes: width, depth, channels, patch size, feed-forward ratio, q and k norms, guidance embedding.
    By rule, unless `fields` says otherwise:
      attention_head_dim is 32; num_cross_attention_heads is 16 at width 1152 and 20 at 2240;
      sample_size is the side of the pos_embed buffer where the file has one, else 32 (1024 pixels);
      interpolation_scale is 1.0 at sample_size 64 (2K), 2.0 at 128 (4K), None (no table) at others;
      timestep_scale is 0.001 with a guidance embedding (Sprint), else 1.0; Sprint's teacher needs 0.001 too
        (`load_transformer` knows it by the name of the file);
      integer_timesteps is whether timestep_scale is 1.0;
      attention_eps and cross_norm_eps are the original code's 1e-8 and 1e-6; clamp_fp16 is off (`load_transformer`
        chooses it by the name of the file).

    Raises:
      ValueError: a tensor that decides is missing, `fields` has no such field, or num_cross_attention_heads is needed.
    """
    check_fields(TransformerConfig, fields)

    def shape(name: str, axes: int) -> tuple[int, ...]:
        return shape_of(tensors, name, axes, "a transformer")

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    hidden = shape("blocks.0.mlp.point_conv.conv.weight", 4)[1]
    ratio = hidden / width
    inferred = dict(
        patch_size=patch,
        in_channels=channels,
        out_channels=shape("final_layer.linear.weight", 2)[0] // patch**2,
        width=width,
        num_layers=1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))),
        caption_channels=shape("y_embedder.y_proj.fc1.weight", 2)[1],
        # The hidden width is int(ratio * width), which must not fall one below by rounding.
        mlp_ratio=ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf),
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        guidance_embeds="cfg_embedder.mlp.0.weight" in tensors,
        sample_size=32,
        **SWITCHES,
    )
    if "pos_embed" in tensors:
        inferred["sample_size"] = math.isqrt(shape("pos_embed", 3)[1]) * patch
    if "num_cross_attention_heads" not in fields:
        if width not in CROSS_ATTENTION_HEADS:
            raise ValueError(
                f"width {width} is none of {', '.join(map(str, CROSS_ATTENTION_HEADS))}, so that the number of "
                "cross-attention heads is not known; give num_cross_attention_heads=..."
            )
        inferred["num_cross_attention_heads"] = CROSS_ATTENTION_HEADS[width]
    fields = inferred | fields
    fields.setdefault("timestep_scale", 0.001 if fields["guidance_embeds"] else 1.0)
    fields.setdefault("integer_timesteps", fields["timestep_scale"] == 1.0)
    fields.setdefault("interpolation_scale", INTERPOLATION_SCALES.get(fields["sample_size"]))
    return TransformerConfig(**fields)


def entries(config: TransformerConfig) -> list[Entry]:
    """The key table of a model of this configuration.

    Raises:
      ValueError: the configuration is an ablation that the original files do not have.
    """
    if config.feed_forward != "mix_ffn":
        raise ValueError(f"feed_forward={config.feed_forward!r} has no native layout; use 'mix_ffn'.")
    table = [
        *dense_entries("patch_embed", "x_embedder.proj", patch_form(config.patch_size)),
        *dense_entries("time_embed/linear_1", "t_embedder.mlp.0"),
        *dense_entries("time_embed/linear_2", "t_embedder.mlp.2"),
        *dense_entries("modulation", "t_block.1"),
        *dense_entries("caption/linear_1", "y_embedder.y_proj.fc1"),
        *dense_entries("caption/linear_2", "y_embedder.y_proj.fc2"),
        Entry("caption/norm/scale", ("attention_y_norm.weight",)),
        Entry("scale_shift_table", ("final_layer.scale_shift_table",)),
        *dense_entries("proj_out", "final_layer.linear"),
    ]
    if config.guidance_embeds:
        table += dense_entries("guidance_embed/linear_1", "cfg_embedder.mlp.0")
        table += dense_entries("guidance_embed/linear_2", "cfg_embedder.mlp.2")
    ours, theirs, layers = "blocks", "blocks.{layer}", config.num_layers
    table += [
        Entry(f"{ours}/scale_shift_table", (f"{theirs}.scale_shift_table",), SAME, layers),
        Entry(f"{ours}/self_attention/qkv/kernel", (f"{theirs}.attn.qkv.weight",), fused_linear(3), layers),
        *dense_entries(f"{ours}/self_attention/out", f"{theirs}.attn.proj", layers=layers),
        *dense_entries(f"{ours}/cross_attention/query", f"{theirs}.cross_attn.q_linear", layers=layers),
        Entry(f"{ours}/cross_attention/kv/kernel", (f"{theirs}.cross_attn.kv_linear.weight",), fused_linear(2), layers),
        Entry(f"{ours}/cross_attention/kv/bias", (f"{theirs}.cross_attn.kv_linear.bias",), fused_bias(2), layers),
        *dense_entries(f"{ours}/cross_attention/out", f"{theirs}.cross_attn.proj", layers=layers),
        *dense_entries(f"{ours}/feed_forward/expand", f"{theirs}.mlp.inverted_conv.conv", POINTWISE, layers),
        *dense_entries(f"{ours}/feed_forward/depthwise", f"{theirs}.mlp.depth_conv.conv", DEPTHWISE, layers),
        Entry(f"{ours}/feed_forward/project/kernel", (f"{theirs}.mlp.point_conv.conv.weight",), POINTWISE, layers),
    ]
    if config.qk_norm:
        for mine, native in (("self_attention", "attn"), ("cross_attention", "cross_attn")):
            for norm in "qk":
                name = f"{theirs}.{native}.{norm}_norm.weight"
                table.append(Entry(f"{ours}/{mine}/norm_{norm}/scale", (name,), SAME, layers))
    return table


def fused_linear(parts: int) -> Form:
    """Linear layers side by side, [parts * out, in] <-> [in, parts, out]."""
    return Form(
        lambda x: x.reshape(parts, -1, x.shape[1]).transpose(2, 0, 1),
        lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
    )


def fused_bias(parts: int) -> Form:
    """[parts * out] <-> [parts, out]."""
    return Form(lambda x: x.reshape(parts, -1), lambda x: x.reshape(-1))
