"""Which text tokens the transformer sees in place of a dropped caption."""

import logging

import jax
import numpy as np
import pytest
import tiny_run
from tiny_pipeline import tiny_parts

from configs import base
from sana_jax import SanaPipeline, prompts
from sana_jax.parallel import sharding
from sana_jax.parallel.mesh import make_mesh
from sana_jax.tokenizer import save, train_tokenizer
from sana_jax.training.sources import open_sources
from sana_jax.training.caption_tokens import check_instruction
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
    return make_text_to_image_task(config, open_sources(config, str(folders), ()))


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


@pytest.mark.parametrize("mean, std, levels", [(8.0, 0.1, [9]), (-8.0, 0.1, [0]), (0.0, 0.01, [7]), (0.0, 1.0, None)])
def test_noise_levels_follow_the_normal_law_of_the_config(folders, mean, std, levels):
    """With a shift of 3 the index in the middle, 0.5, is the level 0.75."""
    config = tiny_run.config(folders / "pictures", folders / "vae")
    config.train.update(logit_mean=mean, logit_std=std)
    task = make_text_to_image_task(config, open_sources(config, str(folders), ()))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), jax.eval_shape(task.init, jax.random.key(0)))
    latents = np.ones((8, 4, 4, 8), np.float32)
    batch = task.prepare({"images": latents, "captions": ["a red apple"] * 8}) | {"latents": latents}
    with jax.set_mesh(make_mesh()):
        keys = jax.random.split(jax.random.key(1), 8)
        _, metrics = jax.jit(task.loss)(params, {"autoencoder": {}}, batch, keys, 0)
    drawn = np.flatnonzero(metrics["loss_at_sigma"].counts)
    assert drawn.tolist() == levels if levels else len(drawn) > 2


def test_the_first_caption_that_is_cut_is_told_of(folders, caplog):
    task, length = make_task(folders, "own"), tiny_run.config(folders, folders).text_encoder.max_length
    pictures = np.zeros((2, 16, 16, 3), np.uint8)
    with caplog.at_level(logging.WARNING, "absl"):
        task.prepare({"images": pictures, "captions": ["a red apple", " ".join(["red"] * (length - 1))]})
        assert not caplog.messages
        for _ in range(2):
            task.prepare({"images": pictures, "captions": ["red", " ".join(["red"] * (length - 1)) + " a red apple"]})
    (message,) = caplog.messages
    assert (
        message
        == f"captions are read up to {length} tokens (text_encoder.max_length); the first longer one loses: a red apple"
    )


def trained_and_frozen(folders, **text_encoder):
    """For each mode of the text encoder its task, the arrays that nothing trains, a batch, and the loss as a function."""
    parts, pipeline = tiny_parts(), folders / "pipeline"
    save_pipeline(pipeline, **parts._asdict())
    config = tiny_run.config(folders / "pictures", pipeline)
    config.model = base.fields(parts.transformer[0].config)
    config.text_encoder.model = base.fields(parts.text_encoder[0].config)
    config.text_encoder.update(path=str(pipeline), **text_encoder)
    config.train.class_dropout_prob = 0.5
    params = {"transformer": parts.transformer[1], "text_encoder": parts.text_encoder[1]}
    latents = np.random.default_rng(0).normal(size=(4, 4, 4, 8)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 4)
    for mode in ("train", "frozen"):
        config.text_encoder.mode = mode
        task = make_text_to_image_task(config, open_sources(config, str(pipeline), ()))
        captions = ["a red apple", "red", "apple", "an apple"]
        batch = task.prepare({"images": latents, "captions": captions}) | {"latents": latents}
        frozen = task.load_frozen(sharding.places(sharding.placed(task.frozen, make_mesh())))
        yield frozen, batch, lambda *args, task=task: float(jax.jit(task.loss)(params, *args, keys, 0)[0])


def test_the_null_prompt_of_a_frozen_text_encoder_is_encoded_once_and_gives_the_loss_of_a_trained_one(folders):
    with jax.set_mesh(make_mesh()):
        trained, frozen = (loss(*inputs) for *inputs, loss in trained_and_frozen(folders))
    np.testing.assert_allclose(frozen, trained, rtol=1e-6)


def test_the_null_prompt_is_not_encoded_again_at_a_step(folders):
    with jax.set_mesh(make_mesh()):
        _, (frozen, batch, loss) = trained_and_frozen(folders)
        other = frozen | {"null_prompt": jax.tree.map(np.zeros_like, frozen["null_prompt"])}
        assert abs(loss(other, batch) / loss(frozen, batch) - 1) > 1e-6


def test_the_instruction_before_captions_is_encoded_once_and_gives_the_loss_of_whole_texts(folders):
    with jax.set_mesh(make_mesh()):
        whole, rest = trained_and_frozen(folders, use_instruction=True)
        np.testing.assert_allclose(rest[2](*rest[:2]), whole[2](*whole[:2]), rtol=1e-5)
    lengths = [batch["token_ids"].shape[1] for _, batch, _ in (whole, rest)]
    assert lengths[1] < 20 < 100 < lengths[0]


def test_a_caption_that_changes_the_instructions_tokens_is_named():
    ids, shared = np.array([[1, 2, 3], [1, 9, 3]]), np.array([1, 2])
    with pytest.raises(ValueError, match="caption 'pear'.*use_instruction=False"):
        check_instruction(ids, shared, ["apple", "pear"])


def test_captions_are_as_written_and_the_instruction_is_the_public_trainings_where_a_config_says_so(folders, tmp_path):
    config = tiny_run.config(folders / "pictures", folders / "vae")
    config.text_encoder.update(lower_case=False, use_instruction=True, instruction="original", max_length=30)
    sources = open_sources(config, str(folders), ())
    sources = sources._replace(
        tokenizer=train_tokenizer([*"Aa", *prompts.COMPLEX_HUMAN_INSTRUCTION_ORIGINAL], 256, lower_case=False)
    )
    task = make_text_to_image_task(config, sources)
    ids = task.prepare({"images": np.zeros((1, 4, 4, 8), np.float32), "captions": ["An Apple "]})["token_ids"][0]
    text = sources.tokenizer.decode(ids)
    assert text.startswith("".join(prompts.COMPLEX_HUMAN_INSTRUCTION_ORIGINAL))  # <unk> for \\n
    assert text.endswith("User Prompt: An Apple")
    task.export(task.init(jax.random.key(0)), tmp_path / "export", {}, None)
    defaults = SanaPipeline.from_pretrained(tmp_path / "export").defaults
    assert defaults.complex_human_instruction == prompts.COMPLEX_HUMAN_INSTRUCTION_ORIGINAL and not defaults.lower_case


def test_held_out_pictures_are_drawn_without_guidance_up_to_a_scale_of_1_as_the_pipeline_draws_them(folders):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    drawn = {}
    for scale in (0.5, 1.0, 2.0):
        config = tiny_run.config(folders / "pictures", folders / "vae")
        config.sample.guidance_scale = scale
        task, rng = make_text_to_image_task(config, open_sources(config, str(folders), ())), np.random.default_rng(0)
        shapes = (jax.eval_shape(task.init, jax.random.key(0)), task.frozen)
        params, frozen = jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), shapes)  # noqa: B023
        batch = task.prepare_heldout({"images": images, "captions": ["a red apple", "red"]})
        with jax.set_mesh(make_mesh()):
            drawn[scale] = np.asarray(jax.jit(task.show)(params, frozen, batch)[0])
    np.testing.assert_allclose(drawn[0.5], drawn[1.0], atol=1e-5)
    assert np.abs(drawn[2.0] - drawn[1.0]).max() > 1e-3
