"""Whole training runs of a tiny model."""

import dataclasses
import json
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from PIL import Image

from sana_jax.bit_depth import from_eight_bits
from sana_jax.checkpoint import CheckpointError, Checkpoints, UnwrittenError
from sana_jax.data import folder_build, records
from sana_jax.training import loop
from sana_jax.training.metrics import NonFiniteError
from sana_jax.training.termination import Preempted
from sana_jax.weights import folder

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """(workdir, last state) of four steps without a break."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, loop.train(tiny_run.config(data / "pictures", data / "vae"), str(workdir))


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(whole_run, config, tmp_path, monkeypatch):
    monkeypatch.setattr("sana_jax.data.kept_catalog.KEPT_FROM", 0)
    monkeypatch.setattr("sana_jax.data.catalog._known", {})  # as in a process of its own
    config.train.num_steps = 2
    loop.train(config, str(tmp_path))
    config.train.num_steps = 4
    state = loop.train(config, str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, state, whole_run[1])
    assert tiny_run.losses(tmp_path) == tiny_run.losses(whole_run[0])
    assert len(list((tmp_path / "data").iterdir())) == 1  # what was found in the pictures, read once


def test_a_run_killed_after_its_last_checkpoint_and_before_its_export_exports_when_started_again(
    whole_run, config, tmp_path
):
    workdir, _ = whole_run
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    loop.train(config, str(tmp_path / "run"))
    weights = pathlib.Path("export", "transformer", "diffusion_pytorch_model.safetensors")
    assert (tmp_path / "run" / weights).read_bytes() == (workdir / weights).read_bytes()


def test_a_run_leaves_metrics_pictures_and_checkpoints(whole_run, config):
    workdir, _ = whole_run
    assert list(tiny_run.losses(workdir)) == [1, 2, 3, 4]
    first, second = tiny_run.logs(workdir)[:2]
    speed = {"step_seconds", "images_per_second", "data_wait"}
    assert (
        {"loss", "grad_norm", "learning_rate"} <= first.keys() and not speed & first.keys() and speed <= second.keys()
    )
    assert any(name.startswith("loss_at_sigma/0.") for name in first)
    startup = next(line for line in tiny_run.metrics(workdir) if "startup/compile" in line)
    assert startup["step"] == 1
    assert {"startup/task", "startup/init", "startup/data", "startup/trace", "startup/first_step"} <= startup.keys()
    assert [line["step"] for line in tiny_run.metrics(workdir) if "all_loss" in line] == [2, 4]
    assert Image.open(workdir / "samples" / "step_00000004.png").size == (8 * 16, 16)
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 64
    assert list((workdir / "tensorboard").iterdir())
    assert [line["step"] for line in tiny_run.metrics(workdir) if line.get("pause_seconds", 0) > 0] == [2, 4]
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.record()["data_position"] == 4


def test_the_export_is_a_pipeline_of_the_averaged_weights(whole_run):
    workdir, state = whole_run
    parts = folder.read_pipeline(folder.find_pipeline(workdir))
    for part, name in ((parts.transformer, "transformer"), (parts.text_encoder, "text_encoder")):
        jax.tree.map(np.testing.assert_array_equal, part[1], jax.device_get(state.ema[name]))
    assert parts.autoencoder[0].config.scaling_factor == 0.5
    assert parts.defaults.complex_human_instruction is None
    assert parts.defaults.max_sequence_length == 16


def test_what_does_not_train_is_read_for_the_first_export_alone(config, tmp_path, monkeypatch):
    read = []
    load_autoencoder = folder.load_autoencoder

    def counted(path, dtype="float32", **kwargs):
        read.append(kwargs.keys())
        return load_autoencoder(path, dtype, **kwargs)

    monkeypatch.setattr(folder, "load_autoencoder", counted)
    config.train.num_steps, config.train.checkpoint_every = 3, 1
    loop.train(config, str(tmp_path))
    assert read == [{"shardings"}, set()], "once onto the devices, once for three exports"
    assert folder.read_pipeline(folder.find_pipeline(tmp_path)).autoencoder[0].config.scaling_factor == 0.5


def test_an_export_that_cannot_be_written_is_tried_again_and_ends_the_run_only_at_its_end(
    whole_run, config, tmp_path, monkeypatch, caplog
):
    config.train.checkpoint_every, config.train.sample_every = 2, 0
    save, failing = folder.save_pipeline, [True, False]

    def sometimes(*args, **kwargs):
        if failing.pop(0):
            raise OSError("no answer from the file server")
        save(*args, **kwargs)

    monkeypatch.setattr(folder, "save_pipeline", sometimes)
    loop.train(config, str(tmp_path / "one"))
    assert "export could not be written (no answer from the file server); it is tried again at the next" in caplog.text
    weights = pathlib.Path("export", "transformer", "diffusion_pytorch_model.safetensors")
    assert (tmp_path / "one" / weights).read_bytes() == (whole_run[0] / weights).read_bytes()
    failing += [False, True]
    with pytest.raises(UnwrittenError, match=r"export could not be written: no answer from the file server"):
        loop.train(config, str(tmp_path / "two"))
    failing += [False]
    loop.train(config, str(tmp_path / "two"))
    assert (tmp_path / "two" / weights).read_bytes() == (whole_run[0] / weights).read_bytes()


def test_a_run_that_is_told_to_end_saves_before_anything_else(whole_run, config, tmp_path, monkeypatch):
    told = iter([False, True])
    monkeypatch.setattr(loop.Termination, "due", lambda self: next(told))
    config.train.sample_every, config.train.checkpoint_every = 4, 4
    with pytest.raises(Preempted, match="saved step 2 of 4"):
        loop.train(config, str(tmp_path))
    assert not (tmp_path / "export").exists() and not (tmp_path / "samples").exists()
    monkeypatch.undo()
    state = loop.train(config, str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, state, whole_run[1])
    assert (tmp_path / "samples" / "step_00000004.png").is_file()


def test_a_resumed_run_keeps_the_tokens_it_has_learnt(whole_run, config, tmp_path):
    config.init_from = str(whole_run[0])
    config.text_encoder.model.vocab_size = 256
    config.train.num_steps = 2
    loop.train(config, str(tmp_path / "run"))
    asked = "a red apple on a white background"
    tokens = folder.find_pipeline(tmp_path / "run").tokenizer.encode(asked).ids
    tiny_run.write_pictures(tmp_path / "pictures", 24, first=1000)  # whose captions would make another tokenizer
    config.init_from, config.train.num_steps = "", 3
    loop.train(config, str(tmp_path / "run"))
    assert folder.find_pipeline(tmp_path / "run").tokenizer.encode(asked).ids == tokens


def test_a_run_does_not_go_on_with_other_weights_or_pictures_of_the_same_name(whole_run, data, config, tmp_path):
    workdir = shutil.copytree(whole_run[0], tmp_path / "run")
    config.train.num_steps = 5
    module, params = folder.load_autoencoder(data / "vae")
    folder.save_autoencoder(module, jax.tree.map(lambda x: 2 * x, params), tmp_path / "vae")
    config.autoencoder_path = str(tmp_path / "vae")
    with pytest.raises(ValueError, match="the weights of autoencoder are not those that the run was trained with"):
        loop.train(config, str(workdir))
    config.autoencoder_path = str(shutil.copytree(data / "vae", tmp_path / "moved"))
    tiny_run.write_pictures(tmp_path / "pictures", 24, first=1000)
    config.data.path = str(tmp_path / "pictures")
    with pytest.raises(ValueError, match="has as many pictures as the run so far was trained on, and not the same"):
        loop.train(config, str(workdir))
    same = [record for _, record in records.read_dataset(data / "pictures")]
    same[3] = dataclasses.replace(same[3], emoji=dataclasses.replace(same[3].emoji, label="another name"))
    records.write_dataset(tmp_path / "renamed", same, {})
    config.data.path = str(tmp_path / "renamed")
    with pytest.raises(
        ValueError, match="the pictures that the run so far was trained on, with other captions or keys"
    ):
        loop.train(config, str(workdir))
    config.data.path = str(shutil.copytree(data / "pictures", tmp_path / "moved_pictures"))
    loop.train(config, str(workdir))
    assert list(tiny_run.losses(workdir)) == [1, 2, 3, 4, 5]


def test_cached_latents_train_as_latents_encoded_in_the_step(whole_run, config, tmp_path, monkeypatch):
    config.train.update(cache_latents=True, cache_folder=str(tmp_path / "shared"), num_steps=2)
    asked, make_loader = [], loop.loader.make_loader
    monkeypatch.setattr(
        loop.loader, "make_loader", lambda *args, **kwargs: asked.append(kwargs) or make_loader(*args, **kwargs)
    )
    loop.train(config, str(tmp_path / "one"))
    assert [call["images"] for call in asked if "images" in call] == [False], "no picture is decoded again"
    cached, encoded = tiny_run.losses(tmp_path / "one"), tiny_run.losses(whole_run[0])
    assert cached[1] == pytest.approx(encoded[1], rel=1e-3) and cached[2] == pytest.approx(encoded[2], rel=1e-3)

    files = list((tmp_path / "shared" / "latents").glob("*/*.npy"))
    written = [file.stat().st_mtime_ns for file in files]
    config.train.num_steps = 1
    loop.train(config, str(tmp_path / "another"))
    assert files and [file.stat().st_mtime_ns for file in files] == written
    assert tiny_run.losses(tmp_path / "another")[1] == cached[1]


def test_a_run_told_to_end_while_it_caches_latents_ends_at_once(config, tmp_path, monkeypatch):
    config.train.cache_latents = True
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="kept what was read and encoded so far"):
        patch.setattr(loop.Termination, "due", lambda self: True)
        loop.train(config, str(tmp_path))


def test_of_two_runs_in_one_folder_the_later_one_goes_on(config, tmp_path, monkeypatch):
    """The second starts while the first trains, and both would save step 4."""
    config.train.num_steps, config.train.checkpoint_every, config.train.sample_every = 4, 2, 0
    take, later = loop.MetricWindow.take, []

    def take_and_start_another(window, step):
        if step == 3 and not later:
            later.append(None)
            deadline = time.monotonic() + 60
            while not (tmp_path / "checkpoints" / "2").exists():  # Orbax's start removes what is half-written
                assert time.monotonic() < deadline
                time.sleep(0.1)
            later.append(loop.train(config, str(tmp_path)))
        return take(window, step)

    monkeypatch.setattr(loop.MetricWindow, "take", take_and_start_another)
    with pytest.raises(
        CheckpointError, match=r"belongs to another run by now \(host .*, process \d+, since 20.*--workdir of its own"
    ):
        loop.train(config, str(tmp_path))
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.steps() == [4, 2]
    assert int(later[1].step) == 4


def test_cached_latents_of_moving_pictures_are_refused(config, tmp_path):
    config.train.cache_latents = True
    config.data.max_shift = 2
    with pytest.raises(ValueError, match="data.max_shift=2 moves them"):
        loop.train(config, str(tmp_path))


@pytest.mark.slow
def test_a_run_with_muon_goes_on_where_it_stopped(config, tmp_path):
    config.optimizer.name = "muon"
    config.train.num_steps = 2
    loop.train(config, str(tmp_path / "parts"))
    config.train.num_steps = 3
    parts = loop.train(config, str(tmp_path / "parts"))
    whole = loop.train(config, str(tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_a_config_that_contradicts_the_checkpoint_is_an_error_that_lists_the_fields(whole_run, config):
    config.model.num_layers = 3
    config.optimizer.name = "came"
    config.optimizer.betas = (0.9, 0.999, 0.9999)
    message = r"another config[^$]*model.num_layers: 2 -> 3\n.*optimizer.betas: .*\n.*optimizer.name: 'adamw' -> 'came'"
    with pytest.raises(ValueError, match=message):
        loop.train(config, str(whole_run[0]))


def poison(monkeypatch, step):
    """Makes the pictures of one step's batch NaN."""
    next_batch = loop.loader.Loader.__next__

    def poisoned(loader):
        batch = next_batch(loader)
        return batch | {"images": batch["images"].astype(np.float32) * (np.nan if loader.step == step else 1)}

    monkeypatch.setattr(loop.loader.Loader, "__next__", poisoned)


def test_a_loss_that_is_not_finite_aborts_before_anything_is_saved(config, tmp_path, monkeypatch):
    poison(monkeypatch, step=2)
    config.train.log_every = 50
    with pytest.raises(NonFiniteError, match=r"became nan within steps \[\d, 2\], first at step 2"):
        loop.train(config, str(tmp_path))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == []


@pytest.fixture(scope="module")
def everything_run(data, tmp_path_factory):
    """(workdir, last state): bfloat16, half batches, eight-bit moments, averaged, traced, and a batch of NaN in step 2."""
    config, workdir = tiny_run.config(data / "pictures", data / "vae"), tmp_path_factory.mktemp("everything")
    config.dtype = "bfloat16"
    config.optimizer.name = "adamw8bit"
    config.train.accumulate_steps = 2
    config.train.skip_nonfinite = 1
    config.train.profile_steps = (2, 3)
    config.train.sample_every = 0
    config.train.checkpoint_every = 4
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(monkeypatch, step=2)
        return workdir, loop.train(config, str(workdir))


def test_a_batch_of_nan_is_skipped_where_that_is_allowed_and_the_run_is_saved(everything_run):
    workdir, state = everything_run
    assert [line["skipped"] for line in tiny_run.metrics(workdir) if "skipped" in line] == [0, 1, 0, 0]
    assert list(tiny_run.losses(workdir)) == [1, 3, 4]
    assert int(state.step) == 4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.steps() == [4]


def test_weights_and_averages_are_float32_whatever_the_computation_and_the_moments_are(everything_run):
    _, state = everything_run
    assert {x.dtype for x in jax.tree.leaves((state.params, state.ema))} == {jnp.dtype("float32")}
    assert jnp.dtype("uint8") in {x.dtype for x in jax.tree.leaves(state.opt_state)}
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, state.ema)
    assert 0 < min(jax.tree.leaves(differences))


def test_the_steps_asked_for_are_traced(everything_run):
    assert list((everything_run[0] / "profile").rglob("*.xplane.pb"))


def test_a_run_starts_from_the_weights_of_another(whole_run, config, tmp_path):
    config.init_from = str(whole_run[0])
    config.train.num_steps = 0
    state = loop.train(config, str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, state.params, whole_run[1].ema)


def test_weights_of_another_model_are_refused(whole_run, config, tmp_path):
    config.init_from = str(whole_run[0])
    config.model.num_layers = 3
    with pytest.raises(ValueError, match=r"weights in .* are of another model: num_layers \(config 3, weights 2\)"):
        loop.train(config, str(tmp_path))


def test_weights_that_need_the_clip_of_float16_are_refused_without_it_before_anything_is_read(
    whole_run, config, tmp_path, monkeypatch
):
    file = shutil.copytree(whole_run[0], tmp_path / "start") / "export" / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clamp_fp16": True}))
    config.init_from, config.train.num_steps = str(tmp_path / "start"), 0
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="Use --config.model.clamp_fp16=True"):
        patch.setattr(loop, "read_pictures_once", None)
        loop.train(config, str(tmp_path / "run"))
    config.model.clamp_fp16 = True
    loop.train(config, str(tmp_path / "run"))
    assert folder.load_transformer(tmp_path / "run")[0].config.clamp_fp16


def test_a_set_without_held_out_pictures_is_refused_before_anything_is_opened(config, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").write_text("black")
    folder_build.build(tmp_path / "in", tmp_path / "set")
    config.data.path, config.sample.split = str(tmp_path / "set"), "heldout"
    monkeypatch.setattr(loop, "make_task", None)
    with pytest.raises(ValueError, match="--config.sample.split=train, .* python -m sana_jax.data build .*--heldout"):
        loop.train(config, str(tmp_path / "run"))


def test_sizes_that_do_not_fit_are_an_error_with_the_fix(config, tmp_path):
    config.data.image_size = 32
    with pytest.raises(ValueError, match="Use model.sample_size=8"):
        loop.train(config, str(tmp_path))


def test_a_text_encoder_without_a_public_layout_is_refused_before_it_trains(config, tmp_path):
    config.text_encoder.model.qk_norm = True
    with pytest.raises(ValueError, match="config.text_encoder.model: qk_norm=True with attn_logit_softcap=50.0 has no"):
        loop.train(config, str(tmp_path))


def test_a_guidance_embedding_is_refused_before_it_trains(config, tmp_path):
    config.model.guidance_embeds = True
    with pytest.raises(
        ValueError, match="model.guidance_embeds=True is of SANA-Sprint, .* Use distillation.teacher=FOLDER"
    ):
        loop.train(config, str(tmp_path))


def test_a_bucket_as_the_runs_folder_is_an_error_with_the_fix(config):
    with pytest.raises(ValueError, match=r"workdir=gs://bucket/run is no folder .* e.g. --workdir=/mnt/bucket/run"):
        loop.train(config, "gs://bucket/run")
    assert not pathlib.Path("gs:").exists()


def test_a_folder_that_cannot_be_written_to_is_an_error_before_anything_is_computed(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="workdir=.*file/run cannot be written to: .*file is no folder, or one that"):
        loop.train(config, str(tmp_path / "file" / "run"))


def test_the_autoencoder_trains_with_a_discriminator_and_exports_latents_of_unit_scale(data, tmp_path):
    config = tiny_run.config(data / "pictures")
    config.gan.weight = 0.1
    config.gan.width = 16
    config.gan.depth = 2
    config.train.num_steps = 2
    state = loop.train(config, str(tmp_path))
    assert set(state.params) == {"autoencoder", "discriminator"}
    assert {"l1", "psnr", "generator", "discriminator"} <= tiny_run.logs(tmp_path)[0].keys()
    module, params = folder.load_autoencoder(tmp_path)
    batch = loop.heldout_batch(config)
    encode = jax.jit(lambda params, images: module.apply({"params": params}, images, method="encode"))
    latents = encode(params, from_eight_bits(batch["images"]))
    assert float(jnp.std(latents)) * module.config.scaling_factor == pytest.approx(1, rel=1e-3)


def test_a_decoder_trained_on_noisy_latents_leaves_the_encoder_as_it_was(data, tmp_path):
    config = tiny_run.config(data / "pictures")
    config.init_from = str(data / "vae")
    config.freeze_encoder = True
    config.latent_noise = 0.25
    config.train.num_steps = 2
    state = loop.train(config, str(tmp_path))
    _, before = folder.load_autoencoder(data / "vae")
    after = state.params["autoencoder"]
    jax.tree.map(np.testing.assert_array_equal, after["encoder"], before["encoder"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after["decoder"], before["decoder"])
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.slow
def test_training_overfits_eight_real_pictures(data, tmp_path):
    """The autoencoder learns them, then the transformer draws each from its caption."""
    tiny_run.write_pictures(tmp_path / "pictures", 8)
    config = tiny_run.config(tmp_path / "pictures")
    config.data.backgrounds = ("white",)
    config.train.num_steps = 400
    config.train.log_every = 10
    config.train.sample_every = config.train.checkpoint_every = 400
    config.optimizer.learning_rate = 3e-3
    config.sample.num_images = 8
    loop.train(config, str(tmp_path / "autoencoder"))
    before = tiny_run.logs(tmp_path / "autoencoder")[0]
    (after,) = (line["all_psnr"] for line in tiny_run.metrics(tmp_path / "autoencoder") if "all_psnr" in line)
    assert after > 22 > before["psnr"] + 4

    drawn = tiny_run.config(tmp_path / "pictures", tmp_path / "autoencoder")
    drawn.data.backgrounds = ("white",)
    drawn.data.captions = config.data.captions
    for name in ("keyword_share", "no_style_share", "no_article_share"):
        drawn.data.captions[name] = 0.0
    drawn.data.captions.plain_order_share = 1.0
    drawn.train.num_steps = 1000
    drawn.train.log_every = drawn.train.sample_every = drawn.train.checkpoint_every = 1000
    drawn.optimizer.learning_rate = 2e-3
    drawn.sample.num_images = 8
    drawn.sample.num_inference_steps = 20
    drawn.sample.guidance_scale = 2.0
    loop.train(drawn, str(tmp_path / "transformer"))
    grid = np.asarray(Image.open(tmp_path / "transformer" / "samples" / "step_00001000.png"), np.float32)
    pictures = grid.reshape(16, 8, 16, 3).transpose(1, 0, 2, 3) / 127.5 - 1
    targets = from_eight_bits(loop.heldout_batch(drawn)["images"])
    errors = ((pictures[:, None] - targets[None]) ** 2).mean((2, 3, 4))
    assert (errors.argmin(1) == np.arange(8)).sum() >= 5  # by chance: one
