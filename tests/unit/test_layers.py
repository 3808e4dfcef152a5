"""Layers of a transformer and of a text encoder, stacked and apart."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import TINY, inputs, randomised
from tiny_pipeline import tiny_parts

from sana_jax import SanaPipeline, load_transformer, save_transformer
from sana_jax.models import layers
from sana_jax.models.transformer import SanaTransformer
from sana_jax.quantization import quantize_transformer


@pytest.fixture(scope="module")
def params():
    return randomised(TINY)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("perturbed", [None, [[True, False], [False, True]]])
def test_blocks_apart_compute_what_scanned_ones_do(params, quantization, perturbed):
    if quantization is not None:
        params = quantize_transformer(params, quantization)
    perturbed = None if perturbed is None else jnp.array(perturbed)
    run = jax.jit(lambda params: SanaTransformer(TINY).apply({"params": params}, *inputs(), perturbed=perturbed))
    expected = run(params)
    np.testing.assert_allclose(run(layers.take_apart(dict(params))), expected, atol=1e-5 * np.ptp(expected))
    swapped = layers.take_apart(dict(params))
    swapped["blocks"] = {"0": swapped["blocks"]["1"], "1": swapped["blocks"]["0"]}
    assert np.abs(run(swapped) - expected).max() > 1e-2 * np.ptp(expected), "each block has its own parameters"


def test_stacking_undoes_taking_apart(params):
    apart = layers.take_apart(dict(params))
    assert layers.are_apart(apart) and not layers.are_apart(params)
    again = layers.stack(apart)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert layers.stack(again) is again and layers.take_apart(apart) is apart


def test_a_sampler_on_one_device_has_blocks_apart_and_takes_stacked_ones():
    pipe = SanaPipeline(tiny_parts())
    assert layers.are_apart(pipe.params["transformer"]) and layers.are_apart(pipe.params["text_encoder"])
    arguments = dict(num_inference_steps=2, height=8, width=8, output_type="latent")
    expected = pipe("a cat", **arguments)
    pipe.params = pipe.params | {"transformer": layers.stack(pipe.params["transformer"])}
    np.testing.assert_allclose(pipe("a cat", **arguments), expected, atol=1e-4 * np.ptp(expected))


def test_a_saved_model_has_its_blocks_stacked_again(tmp_path):
    pipe = SanaPipeline(tiny_parts())
    pipe.save_pretrained(tmp_path / "model")
    again = SanaPipeline.from_pretrained(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, again.params["transformer"], pipe.params["transformer"])


def test_a_samplers_transformer_is_quantised_and_saved_as_it_is(tmp_path):
    module, params = tiny_parts().transformer
    apart = SanaPipeline(tiny_parts()).params["transformer"]
    jax.tree.map(
        np.testing.assert_array_equal, quantize_transformer(apart, "int8"), quantize_transformer(params, "int8")
    )
    save_transformer(module, apart, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load_transformer(tmp_path, clamp_fp16=False)[1], params)


@pytest.mark.parametrize("prefix", [False, True])
def test_layers_of_the_text_encoder_apart_compute_what_scanned_ones_do(prefix):
    module, params = tiny_parts().text_encoder
    ids, mask = jnp.arange(12).reshape(2, 6) + 5, jnp.array([[1] * 6, [1] * 4 + [0] * 2])

    @jax.jit
    def run(params):
        before = None
        if prefix:
            before = module.apply({"params": params}, jnp.arange(3) + 20, method="encode_prefix")
        return before, module.apply({"params": params}, ids, mask, before)

    expected, found = run(params), run(layers.take_apart(dict(params)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * np.ptp(y)), found, expected)


PEAK = """
import json
import jax
from sana_jax import SanaPipeline
from sana_jax.models import layers

def in_memory():
    return sum(array.nbytes for array in jax.live_arrays())

def unstack(x):
    out = layers._cut(x)  # as on a GPU: the views of a CPU's memory would be counted twice
    stacked.append(x.nbytes)
    peak.append(in_memory())
    return out

stacked, peak, layers._unstack = [], [], unstack
pipe = SanaPipeline.from_pretrained()
sizes = [x.nbytes for x in jax.tree.leaves(pipe.params)]
print(json.dumps([max(peak), sum(sizes), max(stacked)]))
"""


def test_loading_holds_one_parameter_twice_at_most():
    # A process without jaxtyping's wrappers, which keep every argument until the function returns.
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
    peak, total, largest = json.loads(out)
    assert peak <= total + largest + 1000
