"""config.json of every public checkpoint: as diffusers and transformers write it, read here and written back.

The models are built on PyTorch's meta device, which has shapes and no numbers, so that full sizes cost nothing.
"""

import json
import math

import jax
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from sana_jax.models import presets
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.text_encoder import TextEncoder
from sana_jax.models.transformer import SanaTransformer
from sana_jax.weights import autoencoder, layout, text_encoder, transformer
from sana_jax.weights.parts import abstract_params

pytestmark = pytest.mark.parity

SMALL = dict(num_attention_heads=36, num_layers=28, num_cross_attention_heads=16, cross_attention_head_dim=72,
             cross_attention_dim=1152)  # fmt: skip
NORMS = dict(qk_norm="rms_norm_across_heads")
SPRINT = dict(NORMS, guidance_embeds=True, timestep_scale=0.001)
# What differs from diffusers' defaults in the released files, the preset, and the parameters (counted from their layouts).
TRANSFORMERS = {
    "Sana_600M_512px": (dict(SMALL, sample_size=16), presets.sana_600m(16), 591_747_872),
    "Sana_600M_1024px": (SMALL, presets.sana_600m(), 591_747_872),
    "Sana_1600M_512px": (dict(sample_size=16), presets.sana_1600m(16), 1_604_462_752),
    "Sana_1600M_512px_MultiLing": (dict(sample_size=16), presets.sana_1600m(16), 1_604_462_752),
    "Sana_1600M_1024px": ({}, presets.sana_1600m(), 1_604_462_752),
    "Sana_1600M_2Kpx": (dict(sample_size=64, interpolation_scale=1.0), presets.sana_1600m(64), 1_604_462_752),
    "Sana_1600M_4Kpx": (dict(sample_size=128, interpolation_scale=2.0), presets.sana_1600m(128), 1_604_462_752),
    "SANA1.5_1.6B": (NORMS, presets.sana15_1600m(), 1_604_641_952),
    "SANA1.5_4.8B": (dict(NORMS, num_layers=60), presets.sana15_4800m(), 4_721_825_952),
    "Sana_Sprint_0.6B": (SMALL | SPRINT, presets.sprint_600m(), 593_501_216),
    "Sana_Sprint_1.6B": (SPRINT, presets.sprint_1600m(), 1_610_237_472),
}

_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
SANA_AE = dict(
    encoder_block_types=_BLOCKS,
    decoder_block_types=_BLOCKS,
    encoder_layers_per_block=[2, 2, 2, 3, 3, 3],
    decoder_layers_per_block=[3, 3, 3, 3, 3, 3],
    encoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
    decoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
    downsample_block_type="Conv",
    upsample_block_type="interpolate",
    scaling_factor=0.41407,
)
LITE_AE = SANA_AE | dict(
    decoder_block_types=["ResBlock"] * 6,
    decoder_layers_per_block=[0, 3, 5, 4, 4, 4],
    decoder_qkv_multiscales=[[]] * 6,
    upsample_block_type="pixel_shuffle",
    decoder_conv_act_fn="silu",
)


def general_ae(widths, latent_channels, **changes):
    coarse = len(widths) - 3
    return dict(
        latent_channels=latent_channels,
        encoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * coarse,
        decoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * coarse,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=[0, 4, 8] + [2] * coarse,
        decoder_layers_per_block=[0, 5, 10] + [2] * coarse,
        encoder_qkv_multiscales=[[]] * len(widths),
        decoder_qkv_multiscales=[[]] * len(widths),
        decoder_norm_types=["batch_norm"] * 3 + ["rms_norm"] * coarse,
        decoder_act_fns=["relu"] * 3 + ["silu"] * coarse,
        **changes,
    )


WIDTHS = [128, 256, 512, 512, 1024, 1024, 2048, 2048]
AUTOENCODERS = {
    "f32c32_sana_1.1": (SANA_AE, presets.dc_ae_f32c32_sana_1_1()),
    "f32c32_sana_1.0": (SANA_AE | dict(downsample_block_type="conv"), presets.dc_ae_f32c32_sana_1_1()),
    "lite": (LITE_AE, presets.dc_ae_lite_f32c32_sana_1_1()),
    "f32c32_in_1.0": (general_ae(WIDTHS[:6], 32, scaling_factor=0.3189), presets.dc_ae_f32c32_in_1_0()),
    "f32c32_mix_1.0": (
        general_ae(WIDTHS[:6], 32, scaling_factor=0.4552),
        presets.dc_ae_f32c32_in_1_0(scaling_factor=0.4552),
    ),
    "f64c128_in_1.0": (general_ae(WIDTHS[:7], 128, scaling_factor=0.2889), presets.dc_ae_f64c128_in_1_0()),
    "f128c512_in_1.0": (general_ae(WIDTHS, 512), presets.dc_ae_f128c512_in_1_0()),
}


def built(class_, arguments, folder):
    """A diffusers model without numbers, and the config.json it writes."""
    with torch.device("meta"):
        model = class_(**arguments)
    model.save_config(folder)
    return model, json.loads((folder / "config.json").read_text())


COUNTED = ("all releases: config.json, tensor names, shapes", "parameter count, difference")


def count_parameters(module):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(module)))


def check_names_and_shapes(entries, model, module):
    tensors = {name: x for name, x in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    layout.check(entries, tensors, abstract_params(module))


def public(values):
    return {key: value for key, value in values.items() if not key.startswith("_")}


@pytest.mark.parametrize("arguments,preset,count", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_every_public_transformer(arguments, preset, count, tmp_path, measured):
    model, values = built(diffusers.SanaTransformer2DModel, arguments, tmp_path)
    assert transformer.config_from_json(values) == preset
    assert public(transformer.config_to_json(preset)) == public(values)
    check_names_and_shapes(transformer.entries(preset), model, SanaTransformer(preset))
    ours = count_parameters(SanaTransformer(preset))
    assert ours == count
    measured(*COUNTED, abs(ours - sum(x.numel() for x in model.parameters())), 0)


@pytest.mark.parametrize("arguments,preset", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_every_public_autoencoder(arguments, preset, tmp_path, measured):
    model, values = built(diffusers.AutoencoderDC, arguments, tmp_path)
    assert autoencoder.config_from_json(values) == preset
    with torch.device("meta"):
        again = diffusers.AutoencoderDC.from_config(autoencoder.config_to_json(preset))
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    assert {name: x.shape for name, x in again.state_dict().items()} == shapes
    assert autoencoder.config_from_json(json.loads(again.to_json_string())) == preset
    check_names_and_shapes(autoencoder.entries(preset), model, Autoencoder(preset))
    statistics = sum(x.numel() for name, x in model.named_buffers() if "running" in name)
    theirs = statistics + sum(x.numel() for x in model.parameters())
    measured(*COUNTED, abs(count_parameters(Autoencoder(preset)) - theirs), 0)


def test_another_depth_or_width_is_noticed(tmp_path):
    arguments, preset, count = TRANSFORMERS["SANA1.5_1.6B"]
    for key, value in (("num_layers", 19), ("mlp_ratio", 2.0)):
        model, values = built(diffusers.SanaTransformer2DModel, {**arguments, key: value}, tmp_path)
        assert transformer.config_from_json(values) != preset
        assert sum(x.numel() for x in model.parameters()) != count
        with pytest.raises(ValueError, match="does not fit the configuration"):
            check_names_and_shapes(transformer.entries(preset), model, SanaTransformer(preset))


def test_a_file_without_the_keys_that_have_their_defaults_is_the_same_model(tmp_path):
    """As older releases of diffusers wrote them, before these options were there."""
    for module, class_ in ((transformer, diffusers.SanaTransformer2DModel), (autoencoder, diffusers.AutoencoderDC)):
        values = built(class_, {}, tmp_path)[1]
        assert module.config_from_json({"_class_name": module.CLASS_NAME}) == module.config_from_json(values)


def test_gemma_2_2b_with_all_its_keys_and_as_it_is_saved(tmp_path):
    config = transformers.Gemma2Config(architectures=["Gemma2Model"], attn_implementation="eager", dtype="bfloat16")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    every = json.loads(json.dumps(config.to_dict()))
    assert len(every) > 30
    for values in (saved, every, config.to_diff_dict()):
        assert text_encoder.config_from_json(values) == presets.gemma2_2b()
    again = transformers.Gemma2Config(**public(text_encoder.config_to_json(presets.gemma2_2b())))
    kept = set(text_encoder.SHARED_KEYS) | {"attn_logit_softcapping", "layer_types", "rope_parameters"}
    assert {key: getattr(again, key) for key in kept} == {key: getattr(config, key) for key in kept}
    with torch.device("meta"):
        model = transformers.Gemma2Model(config)
    check_names_and_shapes(text_encoder.entries(presets.gemma2_2b()), model, TextEncoder(presets.gemma2_2b()))


def test_gemma_3_with_all_its_keys():
    config = transformers.Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, intermediate_size=2048, sliding_window=512, query_pre_attn_scalar=256,
    )  # fmt: skip
    for values in (config.to_dict(), config.to_diff_dict()):
        assert text_encoder.config_from_json(values) == presets.gemma3_270m()


def changed(value):
    if value is None:
        return 2.0
    if isinstance(value, bool):
        return not value
    return value * 2 or 3 if isinstance(value, int | float) else "another"


@pytest.mark.parametrize("part", ["transformer", "autoencoder", "text_encoder"])
def test_no_key_with_another_value_is_ignored(part, tmp_path):
    """Such a file is an error, or makes another configuration."""
    module, values = {
        "transformer": (transformer, lambda: built(diffusers.SanaTransformer2DModel, {}, tmp_path)[1]),
        "autoencoder": (autoencoder, lambda: built(diffusers.AutoencoderDC, {}, tmp_path)[1]),
        "text_encoder": (text_encoder, lambda: transformers.Gemma2Config().to_dict()),
    }[part]
    values = values()
    plain = module.config_from_json(values)
    ignored = getattr(module, "IGNORED_KEYS", frozenset())
    for key in set(public(values)) - ignored:
        if isinstance(values[key], list | dict):
            continue
        try:
            config = module.config_from_json(values | {key: changed(values[key])})
        except ValueError:
            continue
        assert config != plain, key
    for key, value in (("rope_type", "yarn"), ("num_experts", 8), ("use_gate", False)):
        with pytest.raises(ValueError, match=key):
            module.config_from_json(values | {key: value})


def test_null_where_a_number_is_needed_is_an_error():
    with pytest.raises(ValueError, match="num_layers=null"):
        transformer.config_from_json({"num_layers": None})
    with pytest.raises(ValueError, match="sliding_window=null"):
        text_encoder.config_from_json({"model_type": "gemma2", "sliding_window": None})
