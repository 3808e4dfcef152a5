"""A small model's training step, compiled by XLA's TPU compiler on a machine without a TPU."""

import pytest
import tiny_run

pytest.importorskip("libtpu")

from sana_jax.aot.compile import compile_ahead

pytestmark = [pytest.mark.tpu_aot, pytest.mark.usefixtures("compiled_quickly")]
# The two halves of a depthwise kernel's gradient, some kB, come from other devices than the shards of the whole.
EXCHANGES = ("collective-permute", "all-to-all")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    tiny_run.write_autoencoder(path)
    return path


@pytest.fixture
def config(autoencoder):
    c = tiny_run.config("no pictures are read", autoencoder)
    c.dtype = "bfloat16"
    c.model.width, c.model.num_cross_attention_heads, c.model.remat = 256, 4, "full"
    c.model.sample_size, c.data.image_size, c.data.batch_size = 16, 64, 64
    c.train.cache_latents = True
    c.optimizer.name, c.optimizer.betas = "came", (0.9, 0.999, 0.9999)
    c.mesh.fsdp = 4
    return c


def exchanged(report, *kinds):
    return sum(report.collectives[kind].sent for kind in kinds if kind in report.collectives)


def test_fsdp_gathers_parameters_and_reduces_gradients_and_nothing_else(config):
    report = compile_ahead(config, "v5e:2x4")
    assert report.fits and report.memory.peak < 1e9
    # Latents of 16x16x8 in float32, two ids of 16 tokens: four batches, split over eight chips; and four pictures of 64x64.
    latents, tokens, pictures = 16 * 16 * 8 * 4, 2 * 16 * 4, 64 * 64 * 3
    assert report.memory.beside == 4 * 8 * (latents + tokens) + 4 * (pictures + 2 * tokens)
    assert report.mesh == {"data": 2, "fsdp": 4, "seq": 1}
    assert set(report.collectives) <= {"all-gather", "reduce-scatter", "all-reduce", *EXCHANGES}
    gathered = report.collectives["all-gather"].sent
    assert exchanged(report, *EXCHANGES) < 0.01 * gathered
    # Forward, its repetition and backward each gather three quarters of the bf16 weights.
    assert gathered < 3 * 2 * 0.75 * report.parameters * 1.2


def test_splitting_tokens_adds_the_rows_of_neighbours_and_gathers_no_activations(config):
    config.mesh.fsdp, config.mesh.seq = 2, 4
    report = compile_ahead(config, "v5e:2x4")
    assert report.fits and "collective-permute" in report.collectives
    assert set(report.collectives) <= {"all-gather", "reduce-scatter", "all-reduce", *EXCHANGES}
    assert exchanged(report, "all-to-all") < 0.05 * report.collectives["all-gather"].sent
    assert report.collectives["all-gather"].sent < 3 * 2 * 0.5 * report.parameters * 1.2


def test_two_slices_exchange_gradients_alone(config):
    config.mesh.data = 2
    report = compile_ahead(config, "v5e:2x2*2")
    assert report.collectives["between slices"].sent < 4 * report.parameters / 4 * 1.2


def test_drawing_the_held_out_pictures_is_compiled_where_asked_and_counted_with_the_whole_state(config):
    config.ema.decay = 0.9
    report = compile_ahead(config, "v5e:2x4", show=True)
    drawing = report.show.memory
    assert report.fits and drawing.aliased == 0 and drawing.temporaries > 0
    # float32 weights, the optimizer's two to three of each, over four chips: the average is drawn with, the rest lies beside.
    weights = 4 * report.parameters / 4
    assert 2 * weights < drawing.beside < 5 * weights
    assert weights < drawing.arguments < 2 * weights


def test_a_mistyped_task_is_an_error_as_in_training(config):
    config.task = "autoencodr"
    with pytest.raises(ValueError, match="task='autoencodr' is not one of autoencoder, transformer"):
        compile_ahead(config, "v5e:2x4")


def test_a_step_that_does_not_fit_is_reported_and_not_raised(config):
    config.data.batch_size = 2**17
    report = compile_ahead(config, "v5e:2x4")
    assert not report.fits and "Ran out of memory" in report.refusal[0]


def test_a_distillation_is_compiled_with_its_players_split_and_exchanges_no_activations(config):
    """The text encoder is not there: its shapes are those of Gemma-2."""
    config.text_encoder.mode, config.text_encoder.path = "frozen", "not here"
    config.model.update(
        caption_channels=2304, timestep_scale=0.001, integer_timesteps=False, guidance_embeds=True, num_layers=1
    )
    config.distillation.update(teacher="not here either", critic_blocks=(0,))
    report = compile_ahead(config, "v5e:2x4")
    assert report.fits
    assert set(report.collectives) <= {"all-gather", "reduce-scatter", "all-reduce", *EXCHANGES}
    gathered = report.collectives["all-gather"].sent
    assert exchanged(report, *EXCHANGES) < 0.01 * gathered
