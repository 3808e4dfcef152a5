"""Weight files both ways: those of diffusers and transformers against what we write from them, bit for bit."""

import copy

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from tiny_pipeline import AUTOENCODER, TEXT_ENCODER, TRANSFORMER, random_params

import sana_jax
from sana_jax.models.text_encoder import TextEncoderConfig
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.weights.tensor_files import open_tensors
from sana_jax.weights.text_encoder import config_to_json as gemma_to_json
from sana_jax.weights.transformer import config_to_json

pytestmark = pytest.mark.parity

STEM = "diffusion_pytorch_model"
SPRINT = dict(qk_norm=True, guidance_embeds=True, timestep_scale=0.001, integer_timesteps=False)


def transformer(**options):
    return diffusers.SanaTransformer2DModel.from_config(config_to_json(TransformerConfig(**TRANSFORMER, **options)))


def autoencoder(**options):
    return diffusers.AutoencoderDC(**AUTOENCODER | options)


def text_encoder():
    values = gemma_to_json(TextEncoderConfig(**TEXT_ENCODER))
    return transformers.Gemma2Model(transformers.Gemma2Config(**values, attn_implementation="eager"))


MODELS = {
    "SANA 0.6B, 1.6B": ("transformer", transformer),
    "SANA-1.5 1.6B, 4.8B": ("transformer", lambda: transformer(qk_norm=True)),
    "SANA-Sprint 0.6B, 1.6B": ("transformer", lambda: transformer(**SPRINT)),
    "SANA 1.6B 2K, 4K": ("transformer", lambda: transformer(interpolation_scale=2.0)),
    "DC-AE f32c32 sana-1.0, 1.1": ("autoencoder", autoencoder),
    "DC-AE in-1.0, mix-1.0 (f32, f64, f128)": ("autoencoder", lambda: autoencoder(decoder_norm_types="batch_norm")),
    "Gemma-2-2b-it": ("text_encoder", text_encoder),
}
VARIANTS = {"float32": None, "float16": "fp16", "bfloat16": "bf16"}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    part, make = MODELS[request.param]
    torch.manual_seed(0)
    theirs = make()
    with torch.no_grad():
        for value in theirs.state_dict().values():
            if value.is_floating_point():
                value.copy_(0.1 * torch.randn(value.shape))
    return request.param, part, theirs


def differences(folder, other, part):
    """Names of tensors that only one of two folders has, or of which bytes, shape or dtype differ."""
    stem = "model" if part == "text_encoder" else STEM
    ours, theirs = open_tensors(folder, stem), open_tensors(other, stem)
    shared = ours.keys() & theirs.keys()
    same = {
        name
        for name in shared
        if ours[name].dtype == theirs[name].dtype
        and ours[name].shape == theirs[name].shape
        and ours[name][...].tobytes() == theirs[name][...].tobytes()
    }
    return (ours.keys() | theirs.keys()) - same


@pytest.mark.parametrize("shards", ["single", "sharded"])
@pytest.mark.parametrize("dtype", VARIANTS)
def test_what_we_write_of_their_file_is_their_file(model, dtype, shards, tmp_path, measured):
    name, part, theirs = model
    sharded = shards == "sharded"
    theirs = copy.deepcopy(theirs).to(getattr(torch, dtype))
    limit = {"max_shard_size": "40KB"} if sharded else {}
    theirs.save_pretrained(tmp_path / "theirs", variant=VARIANTS[dtype], **limit)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == sharded
    load, save = getattr(sana_jax, f"load_{part}"), getattr(sana_jax, f"save_{part}")
    module, params = load(tmp_path / "theirs")
    save(module, params, tmp_path / "ours", dtype, **({"max_shard_bytes": 40_000} if sharded else {}))
    count = len(differences(tmp_path / "ours", tmp_path / "theirs", part))
    measured(name, "read and written in 3 dtypes, single and sharded: tensors that differ", count, 0)
    again, read = load(tmp_path / "ours")
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, read, params)
    kept = {"dtype" if part == "text_encoder" else "torch_dtype": getattr(torch, dtype)}
    opened, loading = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True, **kept)
    assert not any(loading.values()), loading
    for key, value in opened.state_dict().items():
        assert value.dtype == theirs.state_dict()[key].dtype and torch.equal(value, theirs.state_dict()[key]), key


def test_one_exchanged_tensor_is_noticed(model, tmp_path):
    _, part, theirs = model
    theirs.save_pretrained(tmp_path / "theirs")
    module, params = getattr(sana_jax, f"load_{part}")(tmp_path / "theirs")
    leaves, tree = jax.tree.flatten(params)
    leaves[-1] = leaves[-1][..., ::-1]
    getattr(sana_jax, f"save_{part}")(module, jax.tree.unflatten(tree, leaves), tmp_path / "ours")
    assert differences(tmp_path / "ours", tmp_path / "theirs", part)


def test_diffusers_opens_a_folder_that_says_it_is_not_clipped(tmp_path):
    module = SanaTransformer(TransformerConfig(**TRANSFORMER))
    params = random_params(module, 0)
    sana_jax.save_transformer(module, params, tmp_path / "Sana_600M_512px")
    assert '"clamp_fp16": false' in (tmp_path / "Sana_600M_512px" / "config.json").read_text()
    opened, loading = diffusers.SanaTransformer2DModel.from_pretrained(
        tmp_path / "Sana_600M_512px", output_loading_info=True
    )
    assert not any(loading.values())
    bias = opened.proj_out.bias.detach().numpy()
    np.testing.assert_array_equal(bias, params["proj_out"]["bias"])
