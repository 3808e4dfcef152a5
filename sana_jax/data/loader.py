"""Batches for training: a deterministic function of (seed, step), whatever the number of processes and threads."""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import grain
import numpy as np
from absl import logging
from jaxtyping import Int, UInt8

from sana_jax.aspect_ratios import Bucket, buckets_of
from sana_jax.data import emoji, picture_set, transforms
from sana_jax.data.captions import CaptionConfig, draw_caption, random_caption
from sana_jax.data.records import Record

# Grain shuffles without a table: it walks through at least 2**16 places until one lies in the set, 6 ms a picture in a set of eight,
# 0.02 in one of 3,000.
TABLE_BELOW = 2**12


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What is loaded and how.

    Attributes:
      path: folder of a data set; empty: the embedded emoji set.
      split: "train", "heldout" or "all".
      image_size: side of the pictures in pixels, where they are square; of others, the root of their area.
      aspect_ratios: height / width that pictures are cropped to, of those in `aspect_ratios.BUCKETS_1024`: each to the nearest.
        The pictures of a step are of one. Every ratio takes the compiler as long as the first.
      batch_size: pictures of a step over all processes.
      backgrounds: colours under drawings (names in `emoji.BACKGROUNDS`), one drawn for each; empty: all.
      captions: how captions vary.
      max_shift: drawings are moved by up to so many pixels in each direction; 0: not at all.
      cache_mb: memory for decoded pictures; a set that needs more is decoded as it is read. Half of it is for those that guide, where
        there are any.
      threads: that prepare pictures, of one batch or of several.
      prefetch: batches prepared ahead; each takes 3 * image_size^2 bytes a picture of this process.
    """

    path: str = ""
    split: str = "train"
    image_size: int = 64
    aspect_ratios: tuple[float, ...] = (1.0,)
    batch_size: int = 64
    backgrounds: tuple[str, ...] = ()
    captions: CaptionConfig = CaptionConfig()
    max_shift: int = 0
    cache_mb: int = 4096
    threads: int = 1
    prefetch: int = 4

    def __post_init__(self):
        names = tuple(self.backgrounds) or tuple(emoji.BACKGROUNDS)
        unknown = [name for name in names if name not in emoji.BACKGROUNDS]
        if unknown:
            raise ValueError(f"unknown backgrounds {unknown}; the backgrounds are {', '.join(emoji.BACKGROUNDS)}")
        object.__setattr__(self, "backgrounds", names)
        for field in ("image_size", "batch_size", "threads", "prefetch"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} is less than 1")
        if self.cache_mb < 0:
            raise ValueError(f"cache_mb={self.cache_mb} is less than 0; with 0 no picture is kept")
        shortest = min(min(bucket.size) for bucket in self.buckets)
        if not 0 <= self.max_shift < shortest:
            raise ValueError(
                f"max_shift={self.max_shift} is not from 0 to {shortest - 1}, less than a picture's shortest side"
            )

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The sizes of `aspect_ratios`, from wide to tall."""
        return buckets_of(self.aspect_ratios, self.image_size)


class Batch(TypedDict):
    """One process's part of a step.

    `images` are None where the loader was told to make none, and of `size` (height, width); `keys` are the records' names,
    `indices` their numbers in that one of `Loader.pictures` which has this size, and `backgrounds` the colours' names ("" under a
    photograph without transparency, which hides it, or that was not decoded). `controls` are the pictures that guide a ControlNet, None
    as `images` are, or where the set was opened without them.
    """

    images: UInt8[np.ndarray, "b H W 3"] | None
    controls: UInt8[np.ndarray, "b H W 3"] | None
    size: tuple[int, int]
    captions: list[str]
    keys: list[str]
    indices: Int[np.ndarray, "b"]
    backgrounds: list[str]


class _Begun(NamedTuple):
    """A batch that is being prepared: each part writes its own images and returns their (caption, background, key)."""

    size: tuple[int, int]
    numbers: Int[np.ndarray, "b"]
    images: UInt8[np.ndarray, "b H W 3"] | None
    controls: UInt8[np.ndarray, "b H W 3"] | None
    parts: list[concurrent.futures.Future[list[tuple[str, str, str]]]]


class Loader:
    """An endless iterator of batches; its whole state is the number of the next step.

    Grain gives the order; the threads are the loader's own, because they write each picture where it belongs in its batch,
    which Grain's would make whole, one batch a thread. They end when it is closed, or when nobody has it any more.

    Attributes:
      pictures: the opened set, a part for each size.
      step: number of the batch that comes next.
    """

    def __init__(
        self,
        config: LoaderConfig,
        pictures: Sequence[picture_set.PictureSet],
        seed: int,
        positions: np.ndarray,
        step: int,
        images: bool,
    ):
        self.pictures = pictures
        self.step = step
        self._config, self._seed, self._positions, self._images = config, seed, positions, images
        self._orders = [_shuffled(len(each), seed) for each in pictures]
        self._turns = _turns([len(each) for each in pictures], seed)
        self._begun: collections.deque[_Begun] = collections.deque()
        self._pool = concurrent.futures.ThreadPoolExecutor(config.threads, "loader")
        # Without waiting: the collector may run in one of the threads.
        self._end = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """The next batch. An error of one of its pictures is raised, again at every further call."""
        while len(self._begun) <= self._config.prefetch:
            self._begun.append(self._begin(self.step + len(self._begun)))
        size, numbers, images, controls, parts = self._begun[0]
        texts, backgrounds, keys = zip(*(drawn for part in parts for drawn in part.result()), strict=True)
        self._begun.popleft()
        self.step += 1
        return {
            "images": images,
            "controls": controls,
            "size": size,
            "captions": list(texts),
            "keys": list(keys),
            "indices": numbers,
            "backgrounds": list(backgrounds),
        }

    def close(self) -> None:
        """Ends the threads, and with them the batches."""
        self._end()
        self._pool.shutdown()

    def _begin(self, step: int) -> _Begun:
        """Gives every thread a part of the batch."""
        (part, turn), count = self._turns[step], len(self._positions)
        pictures, order = self.pictures[part], self._orders[part]
        places = turn * self._config.batch_size + self._positions
        numbers = np.asarray([order[place] for place in places.tolist()], np.int32)
        positions = step * self._config.batch_size + self._positions
        images, controls = (
            np.empty((count, *pictures.size, 3), np.uint8) if wanted else None
            for wanted in (self._images, self._images and pictures.control is not None)
        )
        bounds = np.linspace(0, count, min(self._config.threads, count) + 1).astype(int).tolist()
        parts = [
            self._pool.submit(
                _prepare,
                self._config,
                pictures,
                self._seed,
                positions[a:b],
                numbers[a:b],
                *(None if array is None else array[a:b] for array in (images, controls)),
            )
            for a, b in itertools.pairwise(bounds)
        ]
        return _Begun(pictures.size, numbers, images, controls, parts)


def make_loader(
    config: LoaderConfig,
    *,
    seed: int,
    start_step: int = 0,
    positions: Sequence[int] | np.ndarray | None = None,
    images: bool = True,
    pictures: Sequence[picture_set.PictureSet] | None = None,
) -> Loader:
    """Opens the set and returns the batches from `start_step` on.

    The pictures of each size have an order, a shuffle of all of them, a new one each time it is through, and every batch is
    the next batch_size of one order; sizes take turns as often as they have pictures, so that all pictures are seen as
    often. What is random about a picture depends on the seed, the step and its place in the batch alone, so that the parts which
    processes prepare make the batch that one would make alone.

    Args:
      config: what is loaded.
      seed: of order, captions, backgrounds and shifts.
      start_step: number of the first batch.
      positions: places in a batch that this process prepares (`parallel.sharding.own_positions`); None: all.
      images: whether pictures are decoded; without, a batch says which they are (for latents that were cached).
      pictures: what `open_pictures` of the same config has opened; None: it is opened here.

    Raises:
      FileNotFoundError, ValueError: see `picture_set.open_set`; or a position is not in a batch.
    """
    positions = np.arange(config.batch_size) if positions is None else np.asarray(positions)
    if not len(positions) or positions.min() < 0 or positions.max() >= config.batch_size:
        raise ValueError(f"positions={positions.tolist()} are not from 0 to batch_size-1={config.batch_size - 1}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} is not from 0 to 2**32-1")
    return Loader(config, open_pictures(config) if pictures is None else pictures, seed, positions, start_step, images)


def open_pictures(config: LoaderConfig, controlled: bool = False) -> tuple[picture_set.PictureSet, ...]:
    """The set, a part for each size; warns of sizes whose pictures fill no batch.

    With `controlled` also the pictures that guide a ControlNet.

    Raises:
      FileNotFoundError, ValueError: see `picture_set.open_sets` and `with_control`.
    """
    cache_mb = config.cache_mb // 2 if controlled else config.cache_mb
    found = picture_set.open_sets(config.path, split=config.split, buckets=config.buckets, cache_mb=cache_mb)
    if controlled:
        found = picture_set.with_control(found)
    few = [f"{len(each)} of {each.size[0]}x{each.size[1]}" for each in found if len(each) < config.batch_size]
    if len(found) > 1 and few:
        logging.warning(
            "batches of %d repeat their pictures where there are only %s; fewer data.aspect_ratios would join them with others",
            config.batch_size,
            ", ".join(few),
        )
    return found


def _shuffled(count: int, seed: int) -> grain.MapDataset:
    """0 to count-1 in a random order, then in another, without end."""
    numbers = grain.MapDataset.range(count)
    if count >= TABLE_BELOW:
        return numbers.seed(seed).shuffle().repeat()

    @functools.lru_cache(maxsize=8)  # a batch, and those that are prepared beside it, may span several
    def table(epoch: int) -> Int[np.ndarray, "count"]:
        return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, epoch])).permutation(count)

    return numbers.repeat().map_with_index(lambda position, _: table(position // count)[position % count])


def _turns(counts: Sequence[int], seed: int) -> grain.MapDataset:
    """step -> (which part of a set has its turn, how many turns it has had), for parts of so many pictures.

    Grain gives every part a turn at once, however few its pictures are: with several, step 0 is somewhere in the middle.
    """
    begin = int(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 2, 0])).integers(2**31))
    parts = [
        grain.MapDataset.range(1).repeat().map_with_index(lambda turn, _, part=part: (part, turn))
        for part in range(len(counts))
    ]
    mixed = grain.MapDataset.mix(parts, weights=[count / sum(counts) for count in counts])
    return mixed if len(parts) == 1 else mixed[begin:]


def _prepare(
    config: LoaderConfig,
    pictures: picture_set.PictureSet,
    seed: int,
    positions: Int[np.ndarray, "p"],
    numbers: Int[np.ndarray, "p"],
    images: UInt8[np.ndarray, "p H W 3"] | None,
    controls: UInt8[np.ndarray, "p H W 3"] | None,
) -> list[tuple[str, str, str]]:
    """Writes the pictures of these numbers into `images`, and those that guide into `controls`, on white.

    Returns (caption, background, key) of each.

    `positions` say which random numbers each is drawn with.
    """
    drawn = []
    for place, (position, number) in enumerate(zip(positions.tolist(), numbers.tolist(), strict=True)):
        # A counter-based generator: any position's numbers are had without drawing those before it.
        rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))
        record = pictures.records[number]
        drawing = None if images is None else pictures.rgba(number)
        if record.emoji is None:
            background, text = (
                _photo_background(drawing),
                draw_caption(config.captions, record.captions, record.scores, rng),
            )
        else:
            which, down, right = rng.random(3)
            background = config.backgrounds[int(which * len(config.backgrounds))]
            if config.max_shift and drawing is not None:
                reach = 2 * config.max_shift + 1
                drawing = transforms.shift(
                    drawing, int(down * reach) - config.max_shift, int(right * reach) - config.max_shift
                )
            text = random_caption(
                config.captions, record.emoji.label, record.emoji.style, record.emoji.tags, background, rng
            )
        if drawing is not None:
            colour = np.asarray(emoji.BACKGROUNDS[background or "white"], np.uint8)
            transforms.composite(drawing, colour, out=images[place])
        if controls is not None:
            white = np.asarray(emoji.BACKGROUNDS["white"], np.uint8)
            transforms.composite(pictures.control.rgba(number), white, out=controls[place])
        drawn.append((text, background, record.key))
    return drawn


def _photo_background(rgba: UInt8[np.ndarray, "H W 4"] | None) -> str:
    return "" if rgba is None or rgba[..., 3].min() == 255 else "white"


@dataclasses.dataclass(frozen=True)
class EvaluationItem:
    """A record with its decoded picture.

    Attributes:
      record: what is said of it.
      rgba: the drawing.
    """

    record: Record
    rgba: UInt8[np.ndarray, "S S 4"]

    def image(self, background: str) -> UInt8[np.ndarray, "S S 3"]:
        """The drawing on a background of `emoji.BACKGROUNDS`, as the training loader makes it."""
        return transforms.composite(self.rgba, np.asarray(emoji.BACKGROUNDS[background], np.uint8))

    def caption(self, background: str) -> str:
        """The plain caption of that picture."""
        if self.record.emoji is None:
            return self.record.captions[0]
        return emoji.plain_caption(self.record.emoji, background)


def evaluation_items(split: str = "heldout", *, path: str = "", image_size: int = 64) -> list[EvaluationItem]:
    """All records of a split in the set's order (by concept, then style), with their pictures.

    Raises:
      FileNotFoundError, ValueError: see `picture_set.open_set`.
    """
    pictures = picture_set.open_set(path, split=split, image_size=image_size, cache_mb=2**20)
    return [EvaluationItem(record, pictures.rgba(number)) for number, record in enumerate(pictures.records)]
