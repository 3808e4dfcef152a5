"""What a text-to-image run takes from outside fits together."""

import logging

import pytest
import tiny_run
from tiny_pipeline import tiny_parts

from sana_jax.data import picture_set
from sana_jax.data.loader import LoaderConfig
from sana_jax.tokenizer import save, train_tokenizer
from sana_jax.training import resume, sources
from sana_jax.training.sources import open_sources, pictures_at_once
from sana_jax.weights.folder import save_pipeline

OTHER = train_tokenizer(["some other words than before"], 256)


@pytest.fixture
def config(tmp_path):
    """Starts from a whole model, and has another tokenizer beside it."""
    tiny_run.write_pictures(tmp_path / "pictures", 8)
    save_pipeline(tmp_path / "start", **tiny_parts()._asdict())
    save(OTHER, tmp_path / "tokenizer")
    config = tiny_run.config(tmp_path / "pictures", tmp_path / "start")
    config.init_from = str(tmp_path / "start")
    return config


@pytest.mark.parametrize(
    "devices, side, pictures",
    [(1, 64, 128), (1, 1024, 32), (1, 8192, 1), (8, 512, 512), (8, 1024, 256), (6, 512, 48), (7, 1024, 28)],
)
def test_pictures_that_are_encoded_at_once_fit_devices_memory_and_files(devices, side, pictures):
    assert pictures_at_once(devices, side**2) == pictures


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_embeds_is_refused(config, tmp_path):
    config.init_from, config.text_encoder.tokenizer = "", str(tmp_path / "tokenizer")
    config.text_encoder.model.vocab_size = OTHER.get_vocab_size() - 1
    with pytest.raises(ValueError, match=f"embeds .*. Use text_encoder.model.vocab_size={OTHER.get_vocab_size()}"):
        open_sources(config, str(tmp_path / "run"), ())


def test_a_text_encoder_that_starts_from_a_model_keeps_that_models_tokens(config, tmp_path):
    config.text_encoder.model.vocab_size = 10_000
    open_sources(config, str(tmp_path / "run"), ())
    config.text_encoder.tokenizer = str(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="has other tokens than init_from=.* Use text_encoder.tokenizer=''"):
        open_sources(config, str(tmp_path / "run"), ())


def test_a_transformer_that_goes_on_with_another_frozen_text_encoder_is_told_of(config, tmp_path, caplog):
    save_pipeline(tmp_path / "frozen", **tiny_parts()._replace(tokenizer=OTHER)._asdict())
    config.text_encoder.mode, config.text_encoder.path = "frozen", str(tmp_path / "start")
    with caplog.at_level(logging.WARNING, "absl"):
        open_sources(config, str(tmp_path / "run"), ())
        assert not caplog.messages
        config.text_encoder.path = str(tmp_path / "frozen")
        open_sources(config, str(tmp_path / "run"), ())
    assert "has another tokenizer than init_from" in caplog.text


def test_a_transformer_of_the_original_code_says_nothing_of_tokens(config, tmp_path, caplog):
    (tmp_path / "model.pth").write_bytes(b"")
    config.text_encoder.mode, config.text_encoder.path = "frozen", str(tmp_path / "start")
    config.init_from = str(tmp_path / "model.pth")
    with caplog.at_level(logging.WARNING, "absl"):
        open_sources(config, str(tmp_path / "run"), ())
    assert not caplog.messages


def test_of_a_large_set_the_tokenizer_reads_captions_of_some_pictures_drawn_at_random(tmp_path, monkeypatch):
    tiny_run.write_pictures(tmp_path / "pictures", 20)
    data = LoaderConfig(path=str(tmp_path / "pictures"), image_size=8, batch_size=1)
    assert len(sources.caption_corpus(data, seed=0, draws=1)) == 20
    monkeypatch.setattr(sources, "CORPUS", 5)
    some = sources.caption_corpus(data, seed=0, draws=1)
    assert len(some) == 5
    assert some == sources.caption_corpus(data, seed=0, draws=1) != sources.caption_corpus(data, seed=1, draws=1)


@pytest.mark.parametrize(
    "place, what",
    [
        (0, "the first process has 8"),
        (1, "as many pictures as the first process has, and"),
        (2, "the pictures that the first process has, with other captions"),
    ],
)
def test_a_host_with_another_set_than_the_first_is_told(config, place, what, monkeypatch):
    pictures = picture_set.open_set(config.data.path, image_size=8)
    resume.check_same_data(None, [pictures])

    def from_first(numbers):
        return [number + (index == place) for index, number in enumerate(numbers)]

    monkeypatch.setattr(resume.multihost, "from_first", from_first)
    with pytest.raises(ValueError, match=what.replace("8", str(len(pictures) + 1))):
        resume.check_same_data(None, [pictures])
