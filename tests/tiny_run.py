"""A training run small enough to test: 16x16 emoji, an autoencoder of three stages, a transformer of two blocks."""

import itertools
import json
import pathlib

import jax
import numpy as np
from PIL import Image

from configs import base
from sana_jax.data import folder_build, picture_set, records
from sana_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sana_jax.models.text_encoder import TextEncoderConfig
from sana_jax.models.transformer import TransformerConfig
from sana_jax.weights import folder

AUTOENCODER = AutoencoderConfig(
    latent_channels=8,
    encoder_block_out_channels=(16, 16, 16),
    decoder_block_out_channels=(16, 16, 16),
    encoder_layers_per_block=(0, 1, 1),
    decoder_layers_per_block=(0, 1, 1),
    encoder_qkv_multiscales=((), (), ()),
    decoder_qkv_multiscales=((), (), ()),
    scaling_factor=0.5,
)
TRANSFORMER = TransformerConfig(
    sample_size=4,
    in_channels=8,
    out_channels=8,
    width=64,
    num_layers=2,
    num_cross_attention_heads=2,
    caption_channels=32,
)
TEXT_ENCODER = TextEncoderConfig(
    vocab_size=256,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp_dim=64,
    sliding_window=16,
    query_pre_attn_scalar=16,
)


def write_pictures(path: pathlib.Path, count: int, first: int = 0) -> None:
    """A data set of `count` embedded emoji."""
    found = (record for _, record in records.read_dataset(picture_set.embedded_path()))
    records.write_dataset(path, itertools.islice(found, first, first + count), {"name": "test"})


def write_photographs(path: pathlib.Path, shapes: list[tuple[int, int]], control: bool = False) -> None:
    """A data set of noise, one picture of each (height, width); with `control` their negatives guide."""
    source, rng = path.with_name(f"{path.name}_files"), np.random.default_rng(0)
    source.mkdir(parents=True)
    for number, shape in enumerate(shapes):
        picture = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(picture).save(source / f"{number:02}.png")
        (source / f"{number:02}.txt").write_text(f"picture {number}")
        if control:
            Image.fromarray(255 - picture).save(source / f"{number:02}.control.png")
    folder_build.build(source, path, control=control)


def write_autoencoder(path: pathlib.Path) -> None:
    """A random autoencoder in diffusers layout."""
    module, rng = Autoencoder(AUTOENCODER), np.random.default_rng(0)
    shapes = folder.abstract_params(module)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.2).astype(np.float32), shapes)
    folder.save_autoencoder(module, params, path)


def write_data(path: pathlib.Path) -> None:
    """What a run of the transformer reads: PATH/pictures and PATH/vae."""
    write_pictures(path / "pictures", 24)
    write_autoencoder(path / "vae")


def config(pictures: pathlib.Path, autoencoder: pathlib.Path | None = None):
    """The transformer's run, or the autoencoder's where no autoencoder is given."""
    c = base.get_config()
    c.task = "transformer" if autoencoder else "autoencoder"
    c.model = base.fields(TRANSFORMER if autoencoder else AUTOENCODER)
    c.autoencoder_path = str(autoencoder or "")
    c.text_encoder.model = base.fields(TEXT_ENCODER)
    c.text_encoder.max_length = 16
    c.data.path = str(pictures)
    c.data.split = c.sample.split = "all"
    c.data.image_size = 16
    c.data.batch_size = 8
    c.train.num_steps = 4
    c.train.log_every = 1
    c.train.sample_every = 2
    c.train.checkpoint_every = 2
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 2
    c.sample.num_images = 4
    c.sample.num_inference_steps = 2
    return c.lock()


def metrics(workdir: pathlib.Path) -> list[dict]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def logs(workdir: pathlib.Path) -> list[dict]:
    """Those of its steps."""
    return [line for line in metrics(workdir) if "loss" in line]


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """Step -> loss."""
    return {line["step"]: line["loss"] for line in logs(workdir)}
