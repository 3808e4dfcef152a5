"""Saving at size: the bytes that the format's library would write, one tensor at a time, whole or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from processes import run_script
from tiny_pipeline import AUTOENCODER, random_params, tiny_parts

import sana_jax
from sana_jax.models import layers
from sana_jax.models.autoencoder import Autoencoder, AutoencoderConfig

FILE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_writing_what_was_read_gives_the_same_bytes(dtype, shard_bytes, tmp_path):
    sana_jax.save_transformer(*tiny_parts().transformer, tmp_path / "a", dtype, max_shard_bytes=shard_bytes)
    sana_jax.save_transformer(
        *sana_jax.load_transformer(tmp_path / "a"), tmp_path / "b", dtype, max_shard_bytes=shard_bytes
    )
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "b").iterdir()) and len(names) > (shard_bytes < 10**9) * 3
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("norms", ["rms_norm", "batch_norm"])
def test_a_file_is_what_the_library_of_the_format_writes(dtype, norms, tmp_path):
    module = Autoencoder(AutoencoderConfig(**AUTOENCODER, decoder_norm_types=(norms,) * 3))
    sana_jax.save_autoencoder(module, random_params(module, 0), tmp_path, dtype)
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    assert any(value.dtype == np.int64 for value in tensors.values()) == (norms == "batch_norm")
    assert (tmp_path / FILE).read_bytes() == safetensors.numpy.save(tensors, {"format": "pt"})


def test_layers_apart_are_written_as_stacked_ones(tmp_path):
    module, params = tiny_parts().transformer
    sana_jax.save_transformer(module, params, tmp_path / "stacked")
    sana_jax.save_transformer(module, layers.take_apart(jax.tree.map(jnp.asarray, params)), tmp_path / "apart")
    assert (tmp_path / "apart" / FILE).read_bytes() == (tmp_path / "stacked" / FILE).read_bytes()


@pytest.mark.parametrize("limit", [10**9, 60_000])
@pytest.mark.parametrize("value, dtype", [(np.nan, "float32"), (1e6, "float16")])
def test_a_number_that_cannot_be_written_leaves_the_earlier_files_as_they_were(value, dtype, limit, tmp_path):
    module, params = tiny_parts().transformer
    sana_jax.save_transformer(module, params, tmp_path, dtype, max_shard_bytes=limit)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    last = {**params["proj_out"], "bias": params["proj_out"]["bias"].copy()}
    last["bias"][-1] = value
    doubled = jax.tree.map(lambda x: 2 * x, params)
    with pytest.raises(ValueError, match="proj_out.bias"):
        sana_jax.save_transformer(module, doubled | {"proj_out": last}, tmp_path, dtype, max_shard_bytes=limit)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


SAVING = """
import json, sys
import jax, numpy as np
import sana_jax
from sana_jax.models.layers import take_apart
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.weights.parts import abstract_params

folder, dtype = sys.argv[1:3]

def save(width, depth):
    \"\"\"Bytes of the parameters, and what the process holds besides at most while it saves them.\"\"\"
    module = SanaTransformer(TransformerConfig(width=width, num_layers=depth, caption_channels=64))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), abstract_params(module))
    params = take_apart(jax.device_put(params))
    jax.block_until_ready(params)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = resident("VmRSS")
    sana_jax.save_transformer(module, params, folder, dtype)
    return sum(x.nbytes for x in jax.tree.leaves(params)), resident("VmHWM") - before

def resident(which):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(which))

save(640, 1)  # imports
print(json.dumps(dict(zip(("parameters", "besides"), save(640, 12)))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saving_holds_a_few_tensors_besides_the_parameters(dtype, tmp_path):
    """The largest tensor has 9.8 MB, the parameters 321 MB; measured are 12 MB (float32) and 18 MB."""
    out = run_script(SAVING, tmp_path, dtype, devices=1)
    assert out["parameters"] > 290e6
    assert out["besides"] < 50e6, out
