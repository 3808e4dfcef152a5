"""The text encoder in transformers' layout (`Gemma2Model`, `Gemma3TextModel`): key table and config.json."""

from collections.abc import Mapping

from sana_jax.models.text_encoder import TextEncoderConfig
from sana_jax.weights import setting_rules
from sana_jax.weights.layout import LINEAR, SAME, Entry

# transformers key -> ours, for values that mean the same in both.
SHARED_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_dim",
    "sliding_window": "sliding_window",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "rms_norm_eps": "rms_eps",
}
RULES = setting_rules.of_fields(TextEncoderConfig, SHARED_KEYS)
# Options of which this model has one value only (here and in transformers' default).
FIXED_KEYS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "attention_bias": False,
    "rope_scaling": None,
    "use_bidirectional_attention": False,
    # Of transformers' every model; to_dict() has them, save_pretrained only where they are not the default.
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
}
# What says nothing about the hidden states at inference: the language head, labels, generation, initialisation, what a
# call returns, file storage.
IGNORED_KEYS = frozenset(
    [
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "cache_implementation",
        "dtype",
        "eos_token_id",
        "final_logit_softcapping",
        "id2label",
        "initializer_range",
        "label2id",
        "max_position_embeddings",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
PATTERNS = {"gemma2": 2, "gemma3_text": 6}  # transformers' default of every n-th layer attending to all tokens
CLASS_NAMES = {"gemma2": "Gemma2Model", "gemma3_text": "Gemma3TextModel"}


def entries(config: TextEncoderConfig) -> list[Entry]:
    """The key table, for names without prefix; `canonical` brings a file's names into that form."""
    here, there, layers = "layers", "layers.{layer}", config.num_layers
    linears = {
        "attention/q": "self_attn.q_proj",
        "attention/k": "self_attn.k_proj",
        "attention/v": "self_attn.v_proj",
        "attention/out": "self_attn.o_proj",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
    }
    norms = {
        "norm_attention_in": "input_layernorm",
        "norm_attention_out": "post_attention_layernorm",
        "norm_mlp_in": "pre_feedforward_layernorm",
        "norm_mlp_out": "post_feedforward_layernorm",
    }
    if config.qk_norm:
        norms |= {"attention/norm_q": "self_attn.q_norm", "attention/norm_k": "self_attn.k_norm"}
    return [
        Entry("embedding/embedding", ("embed_tokens.weight",)),
        Entry("norm/scale", ("norm.weight",)),
        *(Entry(f"{here}/{a}/kernel", (f"{there}.{b}.weight",), LINEAR, layers) for a, b in linears.items()),
        *(Entry(f"{here}/{a}/scale", (f"{there}.{b}.weight",), SAME, layers) for a, b in norms.items()),
    ]


def canonical(tensors: Mapping) -> dict:
    """Tensors (or whatever the mapping holds) under the names of the bare model: of `model.layers...` the prefix goes, the language head is dropped."""
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    return {name: value for name, value in bare.items() if name != "lm_head.weight" and not name.endswith("inv_freq")}


def config_from_json(values: Mapping) -> TextEncoderConfig:
    """The configuration that a public config.json describes, for model types gemma2 and gemma3_text.

    Keys that a file leaves out have transformers' defaults, which are Gemma-2-2b's.

    Raises:
      ValueError: another model type, an unknown key, or an option with another value than the one implemented.
    """
    if nulls := sorted(key for key in SHARED_KEYS if key in values and values[key] is None):
        raise ValueError(f"config.json of the text encoder has {nulls[0]}=null; this model needs a number there.")
    values = {key: value for key, value in values.items() if value is not None or key == "attn_logit_softcapping"}
    kind = values.get("model_type")
    if kind not in PATTERNS:
        raise ValueError(
            f"config.json of the text encoder has model_type={kind!r}; implemented are {' and '.join(PATTERNS)} "
            "(of a multimodal Gemma-3, take the text part)."
        )
    values = {key.removeprefix("_"): value for key, value in values.items() if key not in IGNORED_KEYS}
    fields = {ours: values.pop(theirs) for theirs, ours in SHARED_KEYS.items() if theirs in values}
    for key, allowed in FIXED_KEYS.items():
        _fixed(key, values.pop(key, allowed), allowed)

    layers = fields.get("num_layers", TextEncoderConfig.num_layers)
    pattern = values.pop("sliding_window_pattern", PATTERNS[kind])
    fields["sliding_pattern"] = _pattern(values.pop("layer_types", None), layers, pattern)
    if kind == "gemma3_text":
        _fixed("attn_logit_softcapping", values.pop("attn_logit_softcapping", None), None)
        fields |= dict(attn_logit_softcap=None, qk_norm=True, vocab_size=fields.get("vocab_size", 262_208))
        full, local = _gemma3_thetas(values)
        fields |= dict(rope_theta=full, rope_local_theta=local)
    else:
        cap = values.pop("attn_logit_softcapping", TextEncoderConfig.attn_logit_softcap)
        fields["attn_logit_softcap"] = None if cap is None else float(cap)
        theta = values.pop("rope_theta", TextEncoderConfig.rope_theta)
        fields["rope_theta"] = _theta(values.pop("rope_parameters", {}), "rope_parameters", theta)
    if values:
        raise ValueError(f"config.json of the text encoder has unknown keys: {', '.join(sorted(map(repr, values)))}.")
    return TextEncoderConfig(**fields)


def config_to_json(config: TextEncoderConfig) -> dict:
    """The config.json that transformers reads.

    Raises:
      ValueError: the combination of options is neither Gemma-2's nor Gemma-3's.
    """
    gemma3 = config.qk_norm
    if gemma3 and config.attn_logit_softcap is not None:
        raise ValueError(
            f"qk_norm=True with attn_logit_softcap={config.attn_logit_softcap} has no public layout: Gemma-3 has no "
            "soft-cap. Use attn_logit_softcap=None."
        )
    if not gemma3 and config.rope_local_theta not in (None, config.rope_theta):
        raise ValueError(
            f"rope_local_theta={config.rope_local_theta} without qk_norm has no public layout: Gemma-2 has one "
            "rotary base. Use rope_local_theta=None or qk_norm=True."
        )
    kind = "gemma3_text" if gemma3 else "gemma2"
    values = {"architectures": [CLASS_NAMES[kind]], "model_type": kind}
    values |= {theirs: getattr(config, ours) for theirs, ours in SHARED_KEYS.items()}
    values |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": config.attn_logit_softcap,
        "layer_types": list(_layer_types(config.num_layers, config.sliding_pattern)),
        "rope_theta": config.rope_theta,
        "max_position_embeddings": 32_768 if gemma3 else 8192,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if gemma3:
        values["rope_local_base_freq"] = (
            config.rope_theta if config.rope_local_theta is None else config.rope_local_theta
        )
        values["sliding_window_pattern"] = config.sliding_pattern
    return values


def _layer_types(layers: int, pattern: int) -> tuple[str, ...]:
    slides = TextEncoderConfig(num_layers=layers, sliding_pattern=pattern).layer_slides()
    return tuple("sliding_attention" if slide else "full_attention" for slide in slides)


def _pattern(layer_types, layers: int, pattern: int) -> int:
    """The n for which every n-th layer attends to all tokens; `layer_types`, where given, decides."""
    if layer_types is None or tuple(layer_types) == _layer_types(layers, pattern):
        return pattern
    for candidate in range(1, layers + 2):
        if tuple(layer_types) == _layer_types(layers, candidate):
            return candidate
    raise ValueError(
        f"config.json of the text encoder has layer_types={list(layer_types)}; implemented is every n-th of the "
        f"{layers} layers full_attention and the others sliding_attention."
    )


def _gemma3_thetas(values: dict) -> tuple[float, float]:
    """Rotary bases of the full and of the window layers, in the two spellings that transformers has had."""
    parameters = values.pop("rope_parameters", {})
    full, local = values.pop("rope_theta", 1_000_000.0), values.pop("rope_local_base_freq", 10_000.0)
    return (
        _theta(parameters.get("full_attention", {}), "rope_parameters.full_attention", full),
        _theta(parameters.get("sliding_attention", {}), "rope_parameters.sliding_attention", local),
    )


def _theta(parameters: Mapping, key: str, default: float) -> float:
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta", default)
    _fixed(f"{key}.rope_type", parameters.pop("rope_type", "default"), "default")
    if parameters:
        raise ValueError(f"config.json of the text encoder has unknown keys in {key}: {sorted(parameters)}.")
    return float(theta)


def _fixed(key: str, value, allowed) -> None:
    if value != allowed:
        raise ValueError(
            f"config.json of the text encoder has {key}={value!r}; this model implements only {allowed!r}."
        )
