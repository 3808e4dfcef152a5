"""What a text-to-image run takes from outside: frozen parts, tokenizer, latents computed beforehand.

A frozen part is known by its configuration alone; its weights are read when somebody asks for them, to where they are wanted.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int
from tokenizers import Tokenizer

from sana_jax import atomic, tokenizer
from sana_jax.bit_depth import from_eight_bits
from sana_jax.compiler_options import compiler_options
from sana_jax.data import kept_catalog, latent_cache, picture_set
from sana_jax.data.captions import random_caption
from sana_jax.data.loader import LoaderConfig
from sana_jax.models.text_encoder import TextEncoderConfig
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.parallel import multihost
from sana_jax.parallel.autoencoder import apply_in_parts
from sana_jax.parallel.mesh import make_mesh
from sana_jax.parallel.sharding import BATCH
from sana_jax.training.settings import is_adapted, loader_config, model_config
from sana_jax.training.start import teacher_config
from sana_jax.training.state import PyTree
from sana_jax.weights import folder, parts
from sana_jax.weights.model_index import EMBEDDED_MODEL, pipeline_folder

# Of a device, whose latents are computed in one call: enough to be worth a call, few enough for the host's memory.
PICTURES_A_CALL, PIXELS_A_CALL = 128, 2**25
CORPUS = 10**6  # pictures whose captions a tokenizer learns from


# (size of the pictures, their numbers in the set of that size, backgrounds), as a batch of the loader has them -> unscaled latents.
Latents = Callable[[tuple[int, int], Int[np.ndarray, " B"], Sequence[str]], Float[np.ndarray, "B h w C"]]


class CachedLatents(NamedTuple):
    """Of a set's pictures, and of those that guide a ControlNet; None where the set was opened without them."""

    pictures: Latents
    controls: Latents | None


class Frozen(NamedTuple):
    """A part that the loss reads and nothing trains.

    Attributes:
      module: with the run's compute dtype in its config.
      load: (dtype, shardings=None) -> (module as stored, parameters), as `folder.load_autoencoder` of a path.
    """

    module: nn.Module
    load: Callable[..., parts.Part]

    @property
    def dtype(self) -> str:
        """Of the weights on the devices: that of the computation, which would cast them at every step."""
        return self.module.config.dtype

    def shapes(self) -> PyTree:
        """Shapes and dtypes of the weights on the devices."""
        shapes = folder.abstract_params(self.module)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(self.dtype)), shapes)

    def load_onto(self, places: PyTree) -> PyTree:
        """The weights, each process reading what `places`, a tree of shardings, gives its devices."""
        return self.load(self.dtype, shardings=places)[1]


class Sources(NamedTuple):
    """See the module.

    Attributes:
      transformer: of which an `Adapter` trains; None where it trains itself.
      teacher: of a distillation; None where there is none.
      autoencoder: whose latents are diffused.
      text_encoder: None where it trains jointly.
      tokenizer: the text encoder's.
      open_latents: () -> latents of all pictures, which are encoded if they are not there yet; to be called once the config is
        known to be right, because that may take hours. None: pictures are encoded in the step.
    """

    transformer: Frozen | None
    teacher: Frozen | None
    autoencoder: Frozen
    text_encoder: Frozen | None
    tokenizer: Tokenizer
    open_latents: Callable[[], CachedLatents] | None


def open_sources(
    config,
    workdir: str,
    pictures: Sequence[picture_set.PictureSet],
    resumed: bool = False,
    between: Callable[[], None] = lambda: None,
) -> Sources:
    """What `config` names; reads configurations and the tokenizer.

    Args:
      config: the whole tree.
      workdir: where the tokenizer of a text encoder that trains is kept, and cached latents unless `cache_folder` says otherwise.
      pictures: whose latents are cached where that is asked for.
      resumed: the run goes on from a checkpoint in `workdir`.
      between: called after every batch of pictures whose latents are computed; what it raises ends the call.

    Raises:
      FileNotFoundError: a folder that the config names is not there.
      ValueError: the config contradicts itself or what it names.
    """
    text_tokenizer = make_tokenizer(config, workdir, resumed)
    autoencoder, text_encoder = frozen_autoencoder(config), frozen_text_encoder(config)
    if not resumed:
        check_tokenizer(config, text_tokenizer, text_encoder)
    open_latents = functools.partial(cache_latents, config, autoencoder, workdir, pictures, between)
    return Sources(
        frozen_transformer(config),
        frozen_teacher(config),
        autoencoder,
        text_encoder,
        text_tokenizer,
        open_latents if config.train.cache_latents else None,
    )


def read_pictures_once(config, workdir: str, between: Callable[[], None]) -> None:
    """Reads a large picture set, all processes together, and keeps what is found for later starts (`data.kept_catalog`)."""
    path = pathlib.Path(config.data.path or picture_set.embedded_path())
    for each in (path, picture_set.control_path(path)) if config.controlnet.num_layers else (path,):
        kept_catalog.read_together(each, cache_folder(config, workdir) / "data", between)


def cache_folder(config, workdir: str) -> pathlib.Path:
    """In which that is kept which other runs with the same pictures may use."""
    return pathlib.Path(config.train.cache_folder or workdir)


def check_heldout(config) -> None:
    """Raises ValueError where the set has no picture of the split to draw and to measure on, before anything is computed."""
    path, split = config.data.path, config.sample.split
    if not picture_set.count_records(path, split):
        raise ValueError(
            f"sample.split={split!r}: no picture of {path} is of it. Use --config.sample.split=train, or hold pictures out "
            "when the set is made: python -m sana_jax.data build folder --heldout=0.01 ..."
        )


def frozen_transformer(config) -> Frozen | None:
    """The transformer of `config.model` with the weights at `config.init_from`; None where it trains."""
    if not is_adapted(config):
        return None
    module = SanaTransformer(model_config(TransformerConfig, config.model, config.dtype, "model"))
    return Frozen(module, functools.partial(folder.load_transformer, config.init_from))


def frozen_teacher(config) -> Frozen | None:
    """The student's transformer, `config.model`, without its guidance, of the weights at `config.distillation.teacher`."""
    path = config.distillation.teacher
    if not path:
        return None
    return Frozen(SanaTransformer(teacher_config(config)), functools.partial(folder.load_transformer, path))


def frozen_autoencoder(config) -> Frozen:
    """The autoencoder that `config.autoencoder_path` names."""
    path = config.autoencoder_path or EMBEDDED_MODEL
    module = parts.find(parts.AUTOENCODER, path).module
    return Frozen(with_dtype(module, config.autoencoder_dtype), functools.partial(folder.load_autoencoder, path))


def frozen_text_encoder(config) -> Frozen | None:
    """The text encoder that `config.text_encoder.path` names; None in the mode "train".

    Raises:
      ValueError: there is no such mode.
    """
    text = config.text_encoder
    if text.mode == "train":
        return None
    if text.mode != "frozen":
        raise ValueError(f"text_encoder.mode={text.mode!r} is not one of train, frozen.")
    module = parts.find(parts.TEXT_ENCODER, text.path).module
    return Frozen(with_dtype(module, config.dtype), functools.partial(folder.load_text_encoder, text.path))


def with_dtype(module: nn.Module, dtype: str) -> nn.Module:
    """The module with another compute dtype."""
    return type(module)(dataclasses.replace(module.config, dtype=dtype))


def cache_latents(
    config,
    autoencoder: Frozen,
    workdir: str,
    pictures: Sequence[picture_set.PictureSet],
    between: Callable[[], None],
) -> CachedLatents:
    """Latents of all `pictures`, and of those that guide them, from latents/ of `cache_folder`.

    What is not there yet is encoded, on every device.

    Raises:
      ValueError: pictures are shifted at random, so that they cannot be listed.
    """
    data = loader_config(config.data)
    if data.max_shift:
        raise ValueError(
            f"train.cache_latents=True needs pictures that do not vary, data.max_shift={data.max_shift} moves them. "
            "Set one of them to False or 0."
        )
    weights = autoencoder.load("float32")[1]
    own = make_mesh(devices=jax.local_devices())  # processes encode different files, and need not meet in a program
    params = jax.device_put(weights, NamedSharding(own, P()))
    pictures_split = NamedSharding(own, BATCH)
    compiled = jax.jit(
        lambda params, images: apply_in_parts(autoencoder.module, params, from_eight_bits(images), "encode"),
        compiler_options=compiler_options(jax.default_backend()),
    )

    def encode(images):
        with jax.set_mesh(own):
            return compiled(params, jax.device_put(images, pictures_split))

    weights_digest = latent_cache.digest(jax.tree.leaves(weights)) + config.autoencoder_dtype
    folder = cache_folder(config, workdir) / "latents"

    def open_cache(each):
        at_once = pictures_at_once(own.size, math.prod(each.size))
        return latent_cache.open_latent_cache(folder, each, data.backgrounds, encode, weights_digest, at_once, between)

    caches = {each.size: open_cache(each) for each in pictures}
    guiding = {each.size: open_cache(each.control) for each in pictures if each.control is not None}
    used = {cache.folder.name for cache in (*caches.values(), *guiding.values())}
    if others := sorted(path.name for path in folder.iterdir() if path.name not in used):
        logging.info("%s also holds latents of other weights, pictures or sizes: %s", folder, ", ".join(others))
    controls = (lambda size, indices, _: guiding[size](indices, [""] * len(indices))) if guiding else None
    return CachedLatents(lambda size, indices, backgrounds: caches[size](indices, backgrounds), controls)


def pictures_at_once(devices: int, pixels: int) -> int:
    """Of a call that encodes them: for each device a power of two, such that few of a file's last call are padding."""
    most = min(PICTURES_A_CALL, PIXELS_A_CALL // pixels, latent_cache.CHUNK // devices)
    each = 2 ** (max(most, 1).bit_length() - 1)
    while each > 1 and -latent_cache.CHUNK % (each * devices) > latent_cache.CHUNK // 16:
        each //= 2
    return each * devices


def make_tokenizer(config, workdir: str, resumed: bool = False) -> Tokenizer:
    """The tokenizer that a config asks for: the frozen encoder's, a file's, that of the weights to start from, or one
    trained on the captions.

    That of an encoder which trains is kept in WORKDIR/tokenizer: `resumed`, the embeddings are of its tokens, whatever
    the config names by then.
    """
    if config.text_encoder.mode == "frozen":
        return stored_tokenizer(config)
    kept = pathlib.Path(workdir) / "tokenizer"
    there = multihost.from_first([kept.is_dir()])[0]  # else a process would see what the first has just made
    if not (resumed and there) and multihost.is_first():
        found = stored_tokenizer(config)
        if found is None:
            captions = caption_corpus(loader_config(config.data), config.seed)
            found = tokenizer.train_tokenizer(
                captions, config.text_encoder.model.vocab_size, config.text_encoder.lower_case
            )
        with atomic.new_folder(kept) as target:
            tokenizer.save(found, target)
    multihost.barrier("tokenizer")
    return tokenizer.load(kept)


def stored_tokenizer(config) -> Tokenizer | None:
    """The tokenizer that a config names; None where one is to be trained.

    Raises:
      FileNotFoundError: it is not there.
    """
    text = config.text_encoder
    if text.mode == "frozen":
        return tokenizer.load(pipeline_folder(text.path))
    if text.tokenizer:
        return tokenizer.load(text.tokenizer)
    if config.init_from:
        return tokenizer.load(pipeline_folder(config.init_from))
    return None


def check_tokenizer(config, found: Tokenizer, text_encoder: Frozen | None) -> None:
    """Says where a tokenizer is not the text encoder's, or not that of the model to start from, or of the teacher.

    A transformer may go on with another frozen text encoder, which is only logged.

    Raises:
      ValueError: tokens would have no embedding, or one that was learnt for another token.
    """
    text, count = config.text_encoder, found.get_vocab_size()
    vocab_size = text.model.get("vocab_size", TextEncoderConfig.vocab_size)
    embedded = text_encoder.module.config.vocab_size if text_encoder else vocab_size
    if count > embedded:
        where = text.path if text_encoder else text.tokenizer or config.init_from or "the captions"
        fix = "a folder whose parts are of one model" if text_encoder else f"text_encoder.model.vocab_size={count}"
        raise ValueError(
            f"the tokenizer of {where} has {count} tokens, and the text encoder embeds {embedded}. Use {fix}."
        )
    other = text.path if text_encoder else text.tokenizer
    start = config.init_from or config.distillation.teacher
    if not (start and other) or pathlib.Path(start).is_file():
        return
    try:
        before = tokenizer.load(pipeline_folder(start))
    except FileNotFoundError:  # a transformer alone says nothing of its text encoder
        return
    if before.get_vocab() == found.get_vocab():
        return
    if text_encoder is None:
        raise ValueError(
            f"text_encoder.tokenizer={other} has other tokens than init_from={config.init_from}, whose embeddings are to "
            "start the text encoder. Use text_encoder.tokenizer=''."
        )
    logging.warning(
        "text_encoder.path=%s has another tokenizer than %s=%s: its transformer has to learn other text features",
        other,
        "init_from" if config.init_from else "distillation.teacher",
        start,
    )


def caption_corpus(data: LoaderConfig, seed: int, draws: int = 8) -> list[str]:
    """Captions as training draws them, `draws` for each emoji; every caption of a photograph.

    Of more than CORPUS pictures, of so many drawn at random.
    """
    rng = np.random.default_rng(seed)
    found = picture_set.open_set(data.path, split=data.split, image_size=data.image_size, cache_mb=0).records
    numbers = (
        range(len(found)) if len(found) <= CORPUS else np.sort(rng.choice(len(found), CORPUS, replace=False)).tolist()
    )
    texts = []
    for record in map(found.__getitem__, numbers):
        texts.extend(record.captions)
        if record.emoji is not None:
            for background in rng.choice(data.backgrounds, draws):
                emoji = record.emoji
                texts.append(random_caption(data.captions, emoji.label, emoji.style, emoji.tags, background, rng))
    return texts
