"""DC-AE against diffusers' AutoencoderDC, on tiny models whose every parameter and statistic is random."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from parity_errors import relative_error

from sana_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sana_jax.weights import layout
from sana_jax.weights.autoencoder import batch_counts, config_from_json, config_to_json, entries

pytestmark = pytest.mark.parity

TINY = dict(
    latent_channels=8,
    attention_head_dim=8,
    encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    encoder_block_out_channels=(16, 32, 32),
    decoder_block_out_channels=(16, 32, 32),
    encoder_layers_per_block=(2, 1, 2),
    decoder_layers_per_block=(1, 2, 1),
    encoder_qkv_multiscales=((), (), ()),
    decoder_qkv_multiscales=((), (), ()),
)
VARIANTS = {
    "sana": dict(
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    ),
    "lite": dict(
        encoder_qkv_multiscales=((), (), (5,)),
        downsample_block_type="conv",
        decoder_block_types="ResBlock",
        decoder_layers_per_block=(0, 2, 1),
        decoder_conv_act_fn="silu",
    ),
    "in_and_mix": dict(
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 2, 1),
        decoder_norm_types=("batch_norm", "batch_norm", "rms_norm"),
        decoder_act_fns=("relu", "relu", "silu"),
    ),
    "empty_stage_0_strided": dict(
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    ),
    "empty_last_stage": dict(encoder_layers_per_block=(1, 1, 0), decoder_layers_per_block=(1, 1, 0)),
    "two_scales_and_batch_norm_attention": dict(
        decoder_qkv_multiscales=((), (), (3, 5)), decoder_norm_types="batch_norm", decoder_act_fns="relu"
    ),
    "no_shortcuts": dict(encoder_out_shortcut=False, decoder_in_shortcut=False),
    "uneven_widths": dict(encoder_block_out_channels=(8, 32, 64), decoder_block_out_channels=(32, 16, 64)),
}

CHECKPOINTS = {
    "sana": "DC-AE f32c32 sana-1.0, 1.1",
    "lite": "DC-AE lite f32c32",
    "in_and_mix": "DC-AE f32c32, f64c128, f128c512 in-1.0, mix-1.0",
}


def is_batch_count(name):
    return name.endswith("num_batches_tracked")


@functools.cache
def make_pair(variant):
    """A diffusers model with random values everywhere, our module, and the same weights in both layouts."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderDC.from_config(config_to_json(AutoencoderConfig(**TINY | VARIANTS[variant]))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            vector = parameter.ndim == 1
            scale = 0.2 if vector else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale + vector)
        for name, buffer in theirs.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    module = Autoencoder(config_from_json(dict(theirs.config)))
    return theirs, tensors, module


def our_params(module, tensors):
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    params = layout.read(entries(module.config), tensors, abstract, ignore=is_batch_count)
    return jax.tree.map(jnp.asarray, params)


@functools.cache
def compiled(module):
    return [jax.jit(functools.partial(module.apply, method=method)) for method in ("encode", "decode")]


def errors(variant, height, width, params=None):
    """Largest difference, over the range of diffusers' values: of the latents, and of the decoded picture."""
    theirs, tensors, module = make_pair(variant)
    params = our_params(module, tensors) if params is None else params
    images = np.random.default_rng(1).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    with torch.no_grad():
        latents = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent
        decoded = theirs.decode(latents).sample.numpy().transpose(0, 2, 3, 1)
    latents = latents.numpy().transpose(0, 2, 3, 1)
    encode, decode = compiled(module)
    ours = encode({"params": params}, jnp.asarray(images)), decode({"params": params}, jnp.asarray(latents))
    return [relative_error(mine, true) for mine, true in zip(ours, (latents, decoded), strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_and_decode_match_diffusers_off_square(variant, measured):
    for method, error in zip(("encode", "decode"), errors(variant, 32, 48), strict=True):
        measured(CHECKPOINTS.get(variant, "DC-AE, other options"), f"{method}, tiny model", error, 1e-4)


@pytest.mark.parametrize("variant", ["sana", "two_scales_and_batch_norm_attention"])
def test_grids_in_the_quadratic_branch_of_diffusers_match(variant):
    # 4 and 8 latent pixels, at most the head dimension 8.
    assert max(errors(variant, 8, 8)) < 1e-4
    assert max(errors(variant, 16, 8)) < 1e-4


def test_the_fine_grid_lowering_of_the_convolution_matches_too():
    # 96 x 80 pixels: the first stages are past the size from which XLA's own convolution is used on CPU.
    assert max(errors("sana", 96, 80)) < 1e-4


def test_reading_q_k_and_v_as_thirds_per_head_breaks_parity():
    _, tensors, module = make_pair("sana")
    params = our_params(module, tensors)
    kernel = params["encoder"]["stage_2_block_0"]["attention"]["qkv"]["kernel"]
    heads = kernel.reshape(kernel.shape[0], 3, -1, module.config.attention_head_dim)
    params["encoder"]["stage_2_block_0"]["attention"]["qkv"]["kernel"] = heads.swapaxes(1, 2).reshape(kernel.shape)
    encode, decode = errors("sana", 32, 48, params)
    assert encode > 1e-2 and decode < 1e-4


def test_leaving_out_the_batch_norm_statistics_breaks_parity():
    _, tensors, module = make_pair("in_and_mix")
    params = our_params(module, tensors)
    norm = params["decoder"]["stage_1_block_0"]["norm"]
    params["decoder"]["stage_1_block_0"]["norm"] = norm | {"mean": 0 * norm["mean"], "var": 0 * norm["var"] + 1}
    assert errors("in_and_mix", 32, 48, params)[1] > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_writing_gives_back_every_public_tensor(variant):
    _, tensors, module = make_pair(variant)
    written = layout.write(entries(module.config), our_params(module, tensors)) | batch_counts(module.config)
    assert written.keys() == tensors.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(value, tensors[name])
