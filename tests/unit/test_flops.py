"""Analytic operation counts against the published table, hand counts and XLA's own count of an unrolled program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny_run

from sana_jax import flops
from sana_jax.models import presets
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.text_encoder import TextEncoder
from sana_jax.models.transformer import SanaTransformer
from sana_jax.weights import folder

# Counted by hand from the public layouts: 10^12 multiply-adds of one forward pass with 300 text tokens at 512, 1024, 2048
# and 4096 pixels, to the digits printed. It counts the blocks, and leaves out the embeddings (0.7 % at 512 pixels).
PUBLISHED = {
    presets.sana_600m: ("0.157", "0.559", "2.17", "8.6"),
    presets.sana_1600m: ("0.415", "1.48", "5.74", "22.8"),
    presets.sana15_4800m: ("1.246", "4.44", "17.2", "68.3"),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_blocks_of_the_public_models_cost_what_the_reference_prints(preset):
    for side, printed in zip((16, 32, 64, 128), PUBLISHED[preset], strict=True):
        whole, one_block = (
            flops.transformer_flops(config, side, side, 300)
            for config in (preset(sample_size=side), preset(sample_size=side, num_layers=1))
        )
        layers = preset().num_layers
        blocks = (whole - one_block) * layers / (layers - 1)
        assert f"{blocks / 2e12:.{len(printed.split('.')[1])}f}" == printed
        assert whole - blocks < 0.01 * whole


def test_one_block_counted_by_hand():
    config = dataclasses.replace(tiny_run.TRANSFORMER, num_layers=2)
    less = dataclasses.replace(tiny_run.TRANSFORMER, num_layers=1)
    block = flops.transformer_flops(config, 4, 4, 10) - flops.transformer_flops(less, 4, 4, 10)
    tokens, d, hidden, text = 16, 64, 160, 10
    self_attention = tokens * d * 3 * d + 2 * tokens * 2 * 32 * 33 + tokens * d * d
    cross_attention = tokens * d * d + text * d * 2 * d + 2 * tokens * text * d + tokens * d * d
    feed_forward = tokens * d * 320 + tokens * 320 * 9 + tokens * hidden * d
    assert block == 2 * (self_attention + cross_attention + feed_forward)


def test_gemma_2_costs_two_operations_a_parameter_and_token_beside_attention():
    config = presets.gemma2_2b()
    matrices = 2_614_341_888 - 256_000 * 2304 - (26 * 4 + 1) * 2304  # without embedding and norms
    scores = 26 * 2 * 300 * 300 * 8 * 256
    assert flops.text_encoder_flops(config, 300) == 2 * (300 * matrices + scores)
    assert flops.text_encoder_flops(config, 100, prefix=200) == 2 * (100 * matrices + scores / 3)


def test_a_training_step_is_three_forward_passes_of_what_trains():
    assert flops.training_flops(trained=10, frozen=7) == 37


def counted_by_xla(module, *args, method=None) -> float:
    params = folder.abstract_params(module)
    call = jax.jit(lambda params, *args: module.apply({"params": params}, *args, method=method))
    return call.lower(params, *args).cost_analysis()["flops"]


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_implementation": "xla"},  # the form of CPUs has operations in excess
        {"self_attention": "softmax", "feed_forward": "gelu_mlp", "patch_size": 2},
    ],
)
def test_the_transformer_costs_what_xla_counts_of_it_unrolled(changes):
    config = dataclasses.replace(
        tiny_run.TRANSFORMER, sample_size=16, width=256, num_cross_attention_heads=4, unroll=2, **changes
    )
    inputs = shape(1, 16, 16, 8), shape(1), shape(1, 20, 32), shape(1, 20, dtype=jnp.int32)
    assert flops.transformer_flops(config, 16, 16, 20) == pytest.approx(
        counted_by_xla(SanaTransformer(config), *inputs), rel=0.03
    )


def test_the_text_encoder_costs_what_xla_counts_of_it_unrolled():
    config = presets.gemma2_tiny(unroll=3)
    tokens = shape(1, 32, dtype=jnp.int32)
    assert flops.text_encoder_flops(config, 32) == pytest.approx(
        counted_by_xla(TextEncoder(config), tokens, tokens), rel=0.03
    )


@pytest.mark.parametrize("preset", [presets.dc_ae_f32c32_sana_1_1, presets.dc_ae_f32c32_in_1_0])
def test_the_autoencoder_costs_what_xla_counts(preset):
    config = preset()
    module = Autoencoder(config)
    assert flops.encoder_flops(config, 512, 512) == pytest.approx(
        counted_by_xla(module, shape(1, 512, 512, 3), method="encode"), rel=0.03
    )
    assert flops.decoder_flops(config, 512, 512) == pytest.approx(
        counted_by_xla(module, shape(1, 16, 16, 32), method="decode"), rel=0.03
    )
