"""The pieces of the training loop, each against its formula."""

import json
import math
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from PIL import Image

from configs import base
from sana_jax.bit_depth import from_eight_bits
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.patch_gan import PatchDiscriminator, discriminator_loss, generator_loss
from sana_jax.training.autoencoder import check_decoder_options, make_autoencoder_task, perturb, psnr
from sana_jax.training.behind import Behind
from sana_jax.training.ema import ema_decay, update_ema
from sana_jax.training.metrics import Binned, MetricWindow, MetricWriter, NonFiniteError, picture_grid
from sana_jax.training.perceptual import perceptual_distance
from sana_jax.training.prefetch import WAITING, prefetch
from sana_jax.training.state import init_state
from sana_jax.training.step import make_step
from sana_jax.weights import efficientnet as efficientnet_weights


def test_ema_follows_the_weights_after_the_update_with_a_ramp():
    import optax

    def loss(params, frozen, batch, keys, step):
        value = jnp.sum(params["w"] * batch)
        return value, {"loss": value}

    step_fn = jax.jit(make_step(loss, optax.sgd(0.1), lambda step: 0.1, seed=0, decay=0.5))
    state = init_state({"w": jnp.ones(3)}, optax.sgd(0.1), with_ema=True)
    w, average = np.ones(3), np.ones(3)
    for n in range(12):
        batch = np.arange(3.0) + n
        state, _ = step_fn(state, {}, jnp.asarray(batch, jnp.float32))
        w = w - 0.1 * batch
        d = min(0.5, (1 + n) / (10 + n))
        average = d * average + (1 - d) * w
        np.testing.assert_allclose(state.ema["w"], average, rtol=1e-5)


def test_ema_decay_reaches_the_configured_value():
    assert float(ema_decay(jnp.asarray(10**7), 0.9999)) == pytest.approx(0.9999)
    assert float(ema_decay(jnp.asarray(0), 0.9999)) == pytest.approx(0.1)


def test_ema_of_equal_weights_stays():
    tree = {"a": jnp.full(4, 2.5)}
    np.testing.assert_array_equal(update_ema(tree, tree, jnp.asarray(0.7))["a"], tree["a"])


def test_the_steps_randomness_depends_on_seed_and_step_alone():
    import optax

    def loss(params, frozen, batch, keys, step):
        noise = jax.random.normal(keys[0])
        return params["w"] * noise, {"loss": noise}

    def noises(seed):
        step_fn = jax.jit(make_step(loss, optax.sgd(0.0), lambda step: 0.0, seed=seed, decay=0.0))
        state = init_state({"w": jnp.ones(())}, optax.sgd(0.0), with_ema=False)
        values = []
        for _ in range(3):
            state, metrics = step_fn(state, {}, jnp.zeros(1))
            values.append(float(metrics["loss"]))
        return values

    assert noises(1) == noises(1)
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(1), n), 1)[0] for n in range(3)]
    assert noises(1) == [float(jax.random.normal(key)) for key in keys]
    assert len(set(noises(1) + noises(2))) == 6


def test_metric_window_averages_and_keeps_what_is_newer():
    window = MetricWindow()
    for step in range(1, 5):
        window.add(step, {"loss": jnp.float32(step)})
    assert window.take(3) == (3, {"loss": 2.0})
    assert window.take(4) == (1, {"loss": 4.0})
    assert window.take(4) == (0, {})


def test_a_metric_that_is_not_finite_is_named_with_its_steps():
    window = MetricWindow()
    for step, value in ((11, 1.0), (12, float("nan")), (13, 2.0)):
        window.add(step, {"loss": jnp.float32(1.0), "grad_norm": jnp.float32(value)})
    with pytest.raises(NonFiniteError, match=r"grad_norm became nan within steps \[11, 13\], first at step 12"):
        window.take(13)


def test_binned_metrics_are_averaged_over_all_steps_and_empty_bins_are_left_out():
    window = MetricWindow()
    for step, (sums, counts) in enumerate([([2.0, 0, 9], [1, 0, 3]), ([4.0, 0, 1], [3, 0, 1])], start=1):
        window.add(step, {"loss": jnp.float32(1), "at": Binned(jnp.asarray(sums), jnp.asarray(counts))})
    means = window.take(2)[1]
    assert means == {"loss": 1.0, "at/0": 1.5, "at/0.666667": 2.5}


def skipped(row):
    """A window of steps from 11 on, of which row says which were skipped; at most two in a row may be."""
    window = MetricWindow(may_skip=2)
    for step, skipped in enumerate(row, start=11):
        loss = jnp.float32(jnp.nan if skipped else step)
        window.add(step, {"loss": loss, "grad_norm": jnp.float32(1), "skipped": jnp.asarray(bool(skipped))})
    return window


def test_skipped_steps_are_counted_and_left_out_of_the_means():
    assert skipped([0, 1, 1, 0]).take(14) == (4, {"loss": 12.5, "grad_norm": 1.0, "skipped": 2.0})
    assert skipped([1, 1]).take(12) == (2, {"skipped": 2.0})
    skipped([1, 1, 0, 1, 1]).take(15)


def test_too_many_skipped_steps_in_a_row_are_an_error_also_across_logs():
    window = skipped([0, 1, 1, 1])
    window.take(13)
    message = r"loss became nan within steps \[12, 14\]: 3 updates in a row were skipped, train.skip_nonfinite=2"
    with pytest.raises(NonFiniteError, match=message):
        window.take(14)


def test_a_run_that_goes_on_writes_the_steps_after_its_checkpoint_anew(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    with MetricWriter(tmp_path, 0, enabled=True) as writer:
        for step in (1, 2, 3):
            writer.scalars(step, {"loss": 0.5})
    with file.open("ab") as stream:
        stream.write(
            b"\0\0\0\n7\n" + file.read_bytes().splitlines(keepends=True)[0] + b'{"step": 2, "lo'
        )  # a disk that went down, then killed
    with MetricWriter(tmp_path, 2, enabled=True) as writer:
        writer.scalars(3, {"loss": 0.25})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    one, two = {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}
    assert lines == [one, two, one, {"step": 3, "loss": 0.25}]
    assert "removed 2 damaged lines" in caplog.text


def test_all_processes_but_the_first_write_nothing(tmp_path):
    with MetricWriter(tmp_path / "run", 0, enabled=False) as writer:
        writer.scalars(1, {"loss": 0.5})
        writer.pictures(1, np.zeros((2, 2, 3), np.uint8))
    assert not (tmp_path / "run").exists()


def test_metrics_are_written_without_importing_pytorch_which_can_be_imported_afterwards(tmp_path):
    (tmp_path / "torch.py").write_text("print('imported')")
    script = f"""
from sana_jax.training.metrics import MetricWriter
with MetricWriter({str(tmp_path)!r}, 0, enabled=True) as writer:
    writer.scalars(1, {{"loss": 0.5}})
print("written", flush=True)
import torch
"""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["written", "imported"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_large_pictures_are_made_smaller_for_tensorboard_alone(tmp_path, monkeypatch):
    shown = []
    with MetricWriter(tmp_path, 0, enabled=True) as writer:
        monkeypatch.setattr(writer._board, "add_image", lambda name, grid, step, dataformats: shown.append(grid.shape))
        for step, width in enumerate((2048, 5000)):
            writer.pictures(step, np.zeros((32, width, 3), np.uint8))
            assert Image.open(tmp_path / "samples" / f"step_{step:08d}.png").size == (width, 32)
    assert shown == [(32, 2048, 3), (11, 1667, 3)]


def test_work_behind_the_steps_is_done_in_order_and_its_errors_reach_the_run():
    done, go = [], threading.Event()
    with Behind() as behind:
        behind.start(lambda: go.wait(60) and done.append(1))
        behind.start(done.append, 2)
        assert not done
        go.set()
        behind.wait()
        assert done == [1, 2]
        behind.start(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            behind.wait()
        behind.start(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            for _ in range(600):
                behind.start(time.sleep, 0.01)
                time.sleep(0.1)
    with pytest.raises(ZeroDivisionError), Behind() as behind:
        behind.start(lambda: 1 / 0)
    with pytest.raises(KeyError), Behind() as behind:
        behind.start(lambda: 1 / 0)
        raise KeyError


def test_picture_grid_lays_pictures_out_row_by_row():
    images = np.stack([np.full((2, 2, 3), value) for value in (-1.0, 0.0, 1.0, 3.0, 1.0)])
    grid = picture_grid(images, columns=2)
    assert grid.shape == (6, 4, 3)
    np.testing.assert_array_equal(grid[::2, ::2, 0], [[0, 128], [255, 255], [255, 0]])


def test_prefetch_keeps_the_order_and_hands_errors_on():
    def source():
        yield 1
        yield 2
        raise OSError("disk gone")

    items = prefetch(source())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(items)


def test_batches_wait_while_a_step_runs_as_the_memory_report_counts_them():
    made = []
    items = prefetch(made.append(i) or i for i in range(100))
    next(items)
    deadline = time.monotonic() + 20
    while len(made) < WAITING and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    items.close()
    assert len(made) == WAITING  # the next step's, those that are ready, and one in the thread's hand


def test_closing_prefetch_ends_its_thread():
    import threading

    def endless():
        while True:
            yield 0

    items = prefetch(endless())
    next(items)
    items.close()
    time.sleep(0.01)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_psnr_of_a_constant_error():
    a = jnp.zeros((2, 4, 4, 3))
    np.testing.assert_allclose(psnr(a + 0.02, a), 10 * np.log10(4 / 0.0004), rtol=1e-4)


def features(images):
    return [images @ jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32), images[:, ::2, ::2]]


def test_latents_are_perturbed_by_a_half_normal_share_of_their_deviation():
    latents = 5 * jax.random.normal(jax.random.key(0), (512, 4, 4, 8))
    noise = perturb(latents, jax.random.split(jax.random.key(1), 512), 0.25) - latents
    levels = jnp.std(noise, axis=(1, 2, 3)) / jnp.std(latents)
    assert float(levels.mean()) == pytest.approx(0.25 * math.sqrt(2 / math.pi), rel=0.1)  # E|a| of a normal a
    assert float(jnp.mean(levels**2)) == pytest.approx(0.25**2, rel=0.15)
    assert float(jnp.median(levels)) == pytest.approx(0.25 * 0.6745, rel=0.15)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latent_noise": -0.1}, "latent_noise=-0.1 is negative"),
        ({"freeze_encoder": True}, "freeze_encoder=True keeps an encoder that nothing has trained; set init_from"),
        (
            {"freeze_encoder": True, "init_from": "runs/x", "optimizer.weight_decay": 0.1},
            "decay would move the encoder. Use weight_decay=0",
        ),
    ],
)
def test_options_of_decoder_training_that_contradict_each_other_are_errors(changes, message):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        check_decoder_options(config)


def test_perceptual_distance_is_the_mean_squared_difference_of_unit_features():
    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(2, 4, 4, 3)).astype(np.float32) for _ in range(2))
    expected = np.zeros(2)
    for a, b in zip(features(jnp.asarray(x)), features(jnp.asarray(y)), strict=True):
        a, b = (np.asarray(f) / np.linalg.norm(f, axis=-1, keepdims=True) for f in (a, b))
        expected += ((a - b) ** 2).sum(-1).mean((1, 2)) / 2
    np.testing.assert_allclose(perceptual_distance(features, jnp.asarray(x), jnp.asarray(y)), expected, rtol=1e-5)


@pytest.mark.parametrize("perceptual", ["lpips", "efficientnet"])
def test_the_weights_of_a_perceptual_term_are_not_read_before_they_are_loaded(perceptual, monkeypatch):
    config = tiny_run.config("no pictures are read")
    config.perceptual_weight, config.perceptual = 1.0, perceptual
    monkeypatch.setattr(efficientnet_weights, "load", efficientnet_weights.load.__wrapped__)
    monkeypatch.setattr(efficientnet_weights, "_MODULE", "no_such_module")
    task = make_autoencoder_task(config)
    assert sum(x.size for x in jax.tree.leaves(task.frozen)) > 4e6
    with pytest.raises((FileNotFoundError, ModuleNotFoundError), match="LPIPS needs|pip install"):
        task.load_frozen(None)


def test_perceptual_distance_of_equal_pictures_is_zero_with_a_finite_gradient():
    x = jnp.zeros((1, 4, 4, 3))
    value, grad = jax.value_and_grad(lambda y: perceptual_distance(features, y, x).sum())(x)
    assert value == 0
    assert np.isfinite(grad).all()


def test_hinge_losses():
    real, fake = jnp.asarray([[[2.0, 0.5]]]), jnp.asarray([[[-3.0, 0.25]]])
    assert float(discriminator_loss(real, fake)) == pytest.approx(0.5 * (0 + 0.5) / 2 + 0.5 * (0 + 1.25) / 2)
    assert float(generator_loss(fake)) == pytest.approx((3 - 0.25) / 2)


def test_the_discriminator_judges_patches():
    critic = PatchDiscriminator(width=16, depth=3)
    params = jax.jit(critic.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert jax.eval_shape(critic.apply, params, jnp.zeros((2, 64, 64, 3))).shape == (2, 8, 8)


@pytest.mark.parametrize("reached", [True, False])
def test_each_player_follows_its_own_loss_once_the_gan_has_started(reached):
    config = tiny_run.config("no pictures are read").unlock()
    config.gan.update(weight=0.5, start_step=3, width=16, depth=2)
    task = make_autoencoder_task(config)
    params = task.init(jax.random.key(0))
    pictures = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)), jnp.uint8)
    images = from_eight_bits(pictures)
    autoencoder = Autoencoder(tiny_run.AUTOENCODER)

    def critic(params, pictures):
        return PatchDiscriminator(width=16, depth=2).apply({"params": params}, pictures)

    def reconstruct(params):
        return autoencoder.apply({"params": params["autoencoder"]}, images)

    def of_the_autoencoder(params):
        output = reconstruct(params)
        played = generator_loss(critic(params["discriminator"], output))
        return jnp.mean(jnp.abs(output - images)) + 0.5 * played * reached

    def of_the_critic(params):
        real, fake = (critic(params["discriminator"], x) for x in (images, reconstruct(params)))
        return discriminator_loss(real, fake) * reached

    gradient = jax.jit(jax.grad(lambda params, step: task.loss(params, {}, {"images": pictures}, None, step)[0]))
    found = gradient(params, jnp.int32(3 if reached else 2))
    for player, loss in (("autoencoder", of_the_autoencoder), ("discriminator", of_the_critic)):
        expected = jax.jit(jax.grad(loss))(params)[player]
        assert any(np.any(x) for x in jax.tree.leaves(expected)) == (reached or player == "autoencoder")
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), found[player], expected)
