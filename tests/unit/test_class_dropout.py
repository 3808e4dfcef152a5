"""Which text tokens the transformer sees in place of a dropped caption."""

import jax
import numpy as np
import pytest
import tiny_run
from tiny_pipeline import tiny_parts

from configs import base
from sana_jax.parallel import sharding
from sana_jax.parallel.mesh import make_mesh
from sana_jax.tokenizer import save, train_tokenizer
from sana_jax.training.sources import open_sources
from sana_jax.training.text_to_image import make_text_to_image_task
from sana_jax.weights.folder import save_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("dropout")
    tiny_run.write_pictures(path / "pictures", 8)
    tiny_run.write_autoencoder(path / "vae")
    save(train_tokenizer(["a red apple"], 256), path / "tokenizer")
    return path


def make_task(folders, null_mask):
    config = tiny_run.config(folders / "pictures", folders / "vae")
    config.text_encoder.null_mask = null_mask
    config.train.class_dropout_prob = 1.0
    return make_text_to_image_task(config, open_sources(config, str(folders)))


@pytest.mark.parametrize("null_mask", ["own", "prompt"])
def test_a_dropped_caption_leaves_its_mask_behind_only_where_it_is_asked_for(null_mask, folders):
    task = make_task(folders, null_mask)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    params = jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), shapes)
    latents = rng.normal(size=(2, 4, 4, 8)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 2)
    loss = jax.jit(lambda *args: task.loss(*args, keys, 0)[0])

    batch = task.prepare({"images": latents, "captions": ["a red apple", "red"]}) | {"latents": latents}

    def change(**tokens):
        with jax.set_mesh(make_mesh()):
            plain, changed = (float(loss(params, {"autoencoder": {}}, x)) for x in (batch, batch | tokens))
        return abs(changed / plain - 1)

    assert change(token_ids=np.where(batch["token_mask"], 7, 0).astype(np.int32)) < 1e-6
    longer = change(token_mask=np.ones_like(batch["token_mask"]))
    assert longer < 1e-6 if null_mask == "own" else longer > 1e-4


def test_the_null_prompt_of_a_frozen_text_encoder_is_encoded_once_and_gives_the_loss_of_a_trained_one(folders):
    parts, pipeline = tiny_parts(), folders / "pipeline"
    save_pipeline(pipeline, **parts._asdict())
    config = tiny_run.config(folders / "pictures", pipeline)
    config.train.class_dropout_prob = 1.0
    config.model = base.fields(parts.transformer[0].config)
    config.text_encoder.model = base.fields(parts.text_encoder[0].config)
    config.text_encoder.path = str(pipeline)
    mesh, keys, losses = make_mesh(), jax.random.split(jax.random.key(1), 2), {}
    latents = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype(np.float32)
    with jax.set_mesh(mesh):
        for mode in ("train", "frozen"):
            config.text_encoder.mode = mode
            task = make_text_to_image_task(config, open_sources(config, str(pipeline)))
            batch = task.prepare({"images": latents, "captions": ["a red apple", "red"]}) | {"latents": latents}
            params = {"transformer": parts.transformer[1], "text_encoder": parts.text_encoder[1]}
            frozen = task.load_frozen(sharding.places(sharding.placed(task.frozen, mesh)))
            if mode == "frozen":
                frozen["text_encoder"] = jax.tree.map(np.zeros_like, frozen["text_encoder"])  # no longer read
            losses[mode] = float(jax.jit(lambda *args, task=task: task.loss(*args, keys, 0)[0])(params, frozen, batch))
    np.testing.assert_allclose(losses["frozen"], losses["train"], rtol=1e-6)


def test_a_null_mask_that_is_none_is_named(folders):
    with pytest.raises(ValueError, match="text_encoder.null_mask='caption' is not one of own, prompt"):
        make_task(folders, "caption")


def test_held_out_pictures_are_drawn_without_guidance_up_to_a_scale_of_1_as_the_pipeline_draws_them(folders):
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    drawn = {}
    for scale in (0.5, 1.0, 2.0):
        config = tiny_run.config(folders / "pictures", folders / "vae")
        config.sample.guidance_scale = scale
        task, rng = make_text_to_image_task(config, open_sources(config, str(folders))), np.random.default_rng(0)
        shapes = (jax.eval_shape(task.init, jax.random.key(0)), task.frozen)
        params, frozen = jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), shapes)  # noqa: B023
        batch = task.prepare_heldout({"images": images, "captions": ["a red apple", "red"]})
        with jax.set_mesh(make_mesh()):
            drawn[scale] = np.asarray(jax.jit(task.show)(params, frozen, batch)[0])
    np.testing.assert_allclose(drawn[0.5], drawn[1.0], atol=1e-5)
    assert np.abs(drawn[2.0] - drawn[1.0]).max() > 1e-3
