"""The diffusion transformer in the diffusers layout (`SanaTransformer2DModel`): key table and config.json."""

from collections.abc import Mapping

from sana_jax.models.transformer import TransformerConfig
from sana_jax.weights import setting_rules
from sana_jax.weights.layout import DEPTHWISE, LINEAR, POINTWISE, SAME, Entry, Form

CLASS_NAME = "SanaTransformer2DModel"

# diffusers key -> ours, for values that mean the same in both.
SHARED_KEYS = {
    "sample_size": "sample_size",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "num_layers": "num_layers",
    "attention_head_dim": "attention_head_dim",
    "num_cross_attention_heads": "num_cross_attention_heads",
    "caption_channels": "caption_channels",
    "mlp_ratio": "mlp_ratio",
    "guidance_embeds": "guidance_embeds",
    "guidance_embeds_scale": "guidance_embeds_scale",
    "timestep_scale": "timestep_scale",
    "interpolation_scale": "interpolation_scale",
}
NULLABLE_KEYS = ("out_channels", "interpolation_scale")
# Keys of ours that diffusers does not know; written only where they differ from the default.
OWN_KEYS = (
    "integer_timesteps",
    "self_attention",
    "feed_forward",
    "attention_eps",
    "cross_norm_eps",
    "clamp_fp16",
)
# diffusers options of which this model has one value only.
FIXED_KEYS = {"dropout": 0.0, "attention_bias": False, "norm_elementwise_affine": False, "norm_eps": 1e-6}
RULES = setting_rules.of_fields(
    TransformerConfig,
    SHARED_KEYS | {key: key for key in OWN_KEYS} | {"num_attention_heads": "num_cross_attention_heads"},
)
RULES["out_channels"] = setting_rules.either(RULES["out_channels"], setting_rules.NULL)
QK_NORM = "rms_norm_across_heads"


def entries(config: TransformerConfig) -> list[Entry]:
    """The key table of a model of this configuration."""
    time = "time_embed" if config.guidance_embeds else "time_embed.emb"
    table = [
        *dense_entries("patch_embed", "patch_embed.proj", patch_form(config.patch_size)),
        *dense_entries("time_embed/linear_1", f"{time}.timestep_embedder.linear_1"),
        *dense_entries("time_embed/linear_2", f"{time}.timestep_embedder.linear_2"),
        *dense_entries("modulation", "time_embed.linear"),
        *dense_entries("caption/linear_1", "caption_projection.linear_1"),
        *dense_entries("caption/linear_2", "caption_projection.linear_2"),
        Entry("caption/norm/scale", ("caption_norm.weight",)),
        Entry("scale_shift_table", ("scale_shift_table",)),
        *dense_entries("proj_out", "proj_out"),
    ]
    if config.guidance_embeds:
        table += dense_entries("guidance_embed/linear_1", "time_embed.guidance_embedder.linear_1")
        table += dense_entries("guidance_embed/linear_2", "time_embed.guidance_embedder.linear_2")
    return table + _block_entries(config)


def config_from_json(values: Mapping, part: str = "transformer") -> TransformerConfig:
    """The configuration a public config.json describes; `part` is whose, for errors.

    Raises:
      ValueError: an option this model does not implement has another value than the one it implements.
    """
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    if nulls := sorted(
        key for key in SHARED_KEYS if key in values and values[key] is None and key not in NULLABLE_KEYS
    ):
        raise ValueError(f"config.json of the {part} has {nulls[0]}=null; this model needs a value there.")
    fields = {ours: values.pop(theirs) for theirs, ours in SHARED_KEYS.items() if theirs in values}
    # diffusers' defaults for the keys that old config files leave out.
    heads = values.pop("num_attention_heads", 70)
    fields.setdefault("attention_head_dim", 32)
    fields["width"] = heads * fields["attention_head_dim"]
    if fields.get("out_channels", 0) is None:
        fields["out_channels"] = fields.get("in_channels", 32)
    fields["qk_norm"] = _fixed(values.pop("qk_norm", None), "qk_norm", (None, QK_NORM), part) == QK_NORM
    fields["integer_timesteps"] = _integer_timesteps(
        fields.get("timestep_scale", 1.0), fields.get("guidance_embeds", False)
    )
    fields.update({key: values.pop(key) for key in OWN_KEYS if key in values})

    cross_heads = fields.setdefault("num_cross_attention_heads", 20)
    _fixed(values.pop("cross_attention_dim", 2240), "cross_attention_dim", (fields["width"],), part)
    head_dim = fields["width"] // cross_heads
    _fixed(values.pop("cross_attention_head_dim", 112), "cross_attention_head_dim", (head_dim,), part)
    for key, allowed in FIXED_KEYS.items():
        _fixed(values.pop(key, allowed), key, (allowed,), part)
    if values:
        raise ValueError(f"config.json of the {part} has unknown keys: {', '.join(sorted(map(repr, values)))}.")
    return TransformerConfig(**fields)


def config_to_json(config: TransformerConfig) -> dict:
    """The config.json that diffusers reads; options of ours are added only where they are not the default."""
    values = {"_class_name": CLASS_NAME}
    values |= {theirs: getattr(config, ours) for theirs, ours in SHARED_KEYS.items()}
    values |= {
        "num_attention_heads": config.width // config.attention_head_dim,
        "cross_attention_head_dim": config.width // config.num_cross_attention_heads,
        "cross_attention_dim": config.width,
        "qk_norm": QK_NORM if config.qk_norm else None,
        **FIXED_KEYS,
    }
    default = TransformerConfig(integer_timesteps=_integer_timesteps(config.timestep_scale, config.guidance_embeds))
    values |= {key: getattr(config, key) for key in OWN_KEYS if getattr(config, key) != getattr(default, key)}
    return values


def _integer_timesteps(timestep_scale: float, guidance_embeds: bool) -> bool:
    """diffusers leaves truncation to the scheduler. Continuous in time are the models that scale timesteps, and Sprint.

    Sprint's public conversion leaves timestep_scale at 1, which its pipeline does not read.
    """
    return timestep_scale == 1.0 and not guidance_embeds


def _block_entries(config: TransformerConfig) -> list[Entry]:
    layers = config.num_layers
    here, there = "blocks", "transformer_blocks.{layer}"

    def stacked(ours, parts, bias):
        names = [f"{there}.{part}" for part in parts]
        table = [Entry(f"{ours}/kernel", tuple(f"{n}.weight" for n in names), LINEAR, layers, axis=1, join="stack")]
        if bias:
            table.append(Entry(f"{ours}/bias", tuple(f"{n}.bias" for n in names), SAME, layers, axis=0, join="stack"))
        return table

    table = [
        Entry(f"{here}/scale_shift_table", (f"{there}.scale_shift_table",), SAME, layers),
        *stacked(f"{here}/self_attention/qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), bias=False),
        *dense_entries(f"{here}/self_attention/out", f"{there}.attn1.to_out.0", layers=layers),
        *dense_entries(f"{here}/cross_attention/query", f"{there}.attn2.to_q", layers=layers),
        *stacked(f"{here}/cross_attention/kv", ("attn2.to_k", "attn2.to_v"), bias=True),
        *dense_entries(f"{here}/cross_attention/out", f"{there}.attn2.to_out.0", layers=layers),
    ]
    if config.qk_norm:
        for ours, theirs in (("self_attention", "attn1"), ("cross_attention", "attn2")):
            for norm in ("norm_q", "norm_k"):
                table.append(Entry(f"{here}/{ours}/{norm}/scale", (f"{there}.{theirs}.{norm}.weight",), SAME, layers))
    if config.feed_forward == "mix_ffn":
        table += dense_entries(f"{here}/feed_forward/expand", f"{there}.ff.conv_inverted", POINTWISE, layers)
        table += dense_entries(f"{here}/feed_forward/depthwise", f"{there}.ff.conv_depth", DEPTHWISE, layers)
        table.append(
            Entry(f"{here}/feed_forward/project/kernel", (f"{there}.ff.conv_point.weight",), POINTWISE, layers)
        )
    else:
        table += dense_entries(f"{here}/feed_forward/expand", f"{there}.ff.linear_1", layers=layers)
        table += dense_entries(f"{here}/feed_forward/project", f"{there}.ff.linear_2", layers=layers)
    return table


def dense_entries(ours: str, theirs: str, form: Form = LINEAR, layers: int | None = None) -> list[Entry]:
    """Kernel and bias of a dense layer or convolution."""
    return [
        Entry(f"{ours}/kernel", (f"{theirs}.weight",), form, layers),
        Entry(f"{ours}/bias", (f"{theirs}.bias",), SAME, layers),
    ]


def patch_form(patch: int) -> Form:
    """Strided convolution [O, I, p, p] <-> dense layer over (row, column, channel) of a patch [p * p * I, O]."""

    def ours(x):
        return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])

    def theirs(x):
        return x.reshape(patch, patch, -1, x.shape[-1]).transpose(3, 2, 0, 1)

    return Form(ours, theirs)


def _fixed(value, key: str, allowed: tuple, part: str):
    if value not in allowed:
        raise ValueError(
            f"config.json of the {part} has {key}={value!r}; this model implements only "
            f"{' or '.join(map(repr, allowed))}."
        )
    return value
