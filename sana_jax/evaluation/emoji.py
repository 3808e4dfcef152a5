"""The embedded model's examination: pictures for held-out (concept, style) pairs, measured.

Held out means: the concept was seen by other hands and the hand on other concepts, the pair never. Every held-out pair is
asked for once, in the plain caption, on a background colour drawn from the palette; the real drawing on the same background
stands beside it in every measure.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int, UInt8

from sana_jax.data import loader
from sana_jax.data.emoji import BACKGROUNDS
from sana_jax.diffusion.noise import initial_noise
from sana_jax.diffusion.trigflow import step_noise
from sana_jax.evaluation import background, features, judge, reconstruction
from sana_jax.evaluation.degradation import degrade
from sana_jax.evaluation.frechet import frechet_distance
from sana_jax.evaluation.nearest import Nearest, nearest
from sana_jax.pipeline import SanaPipeline

_BATCH = 64
_JUDGE_SEED = 0  # the judge and its candidates are the same whatever noise the pictures start from
_SHUFFLES = 20


@dataclasses.dataclass(frozen=True)
class Examples:
    """N drawings, each on a background of the palette, with their captions."""

    pictures: UInt8[np.ndarray, "N H W 3"]
    labels: judge.Labels
    names: Sequence[str]
    backgrounds: Sequence[str]
    prompts: Sequence[str]

    def __len__(self) -> int:
        return len(self.pictures)

    def take(self, indices: Sequence[int]) -> "Examples":
        """Those of the given numbers."""

        def pick(values):
            return tuple(values[index] for index in indices)

        labels = judge.Labels(pick(self.labels.styles), pick(self.labels.concepts), pick(self.labels.groups))
        return Examples(
            self.pictures[np.asarray(indices, int)],
            labels,
            pick(self.names),
            pick(self.backgrounds),
            pick(self.prompts),
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """One measure.

    Attributes:
      name: what is measured.
      unit: "%", "dB" or "".
      reached: on the generated pictures (of the autoencoder: on its reconstructions).
      real: the same on the real held-out drawings: the ceiling, or what is to be compared with.
      reconstructed: the same on the autoencoder's reconstructions of the real drawings; None where it says nothing.
      bar: what is asked for; None where the number is there to be read beside `real`.
    """

    name: str
    unit: str
    reached: float
    real: float | None = None
    reconstructed: float | None = None
    bar: float | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the bar is reached; None without a bar."""
        return None if self.bar is None else bool(self.reached >= self.bar)


@dataclasses.dataclass(frozen=True)
class Result:
    """What an examination found.

    Attributes:
      rows: the table.
      details: numbers behind it, by style and by picture; plain JSON values.
      asked: what was asked for, with the real drawings.
      generated: the pictures made.
    """

    rows: tuple[Row, ...]
    details: dict
    asked: Examples
    generated: UInt8[np.ndarray, "N H W 3"]


def evaluate(
    pipe: SanaPipeline, *, limit: int = 0, seed: int = 0, steps: int | None = None, guidance: float | None = None
) -> Result:
    """Examines a model on the held-out pairs of the embedded set, at the model's own size.

    Args:
      pipe: the model.
      limit: only so many of the pairs, drawn at random with a fixed seed; 0: all.
      seed: of the pictures' noise.
      steps: of the sampler; None: the model's own.
      guidance: scale; None: the model's own.

    Raises:
      ValueError: the model does not draw squares, or fewer than two pairs are left.
      ModuleNotFoundError: the judge's network is not installed.
    """
    if pipe.default_height != pipe.default_width:
        raise ValueError(
            f"the model draws {pipe.default_width}x{pipe.default_height} pictures by default; the emoji set is square."
        )
    training, asked = read_examples(pipe.default_height, limit)
    logging.info("judge: features of %d real training pictures (minutes the first time, then kept)", len(training))
    on_grey = features.extract(background.on_grey(training.pictures))
    chief = judge.fit(training.pictures, on_grey, training.labels)
    logging.info("drawing %d pictures for held-out pairs", len(asked))
    generated = generate(pipe, asked.prompts, seed=seed, steps=steps, guidance=guidance)
    reconstructed = reconstruction.reconstruct(pipe.autoencoder, pipe.params["autoencoder"], asked.pictures)
    return measure(chief, training, on_grey, asked, generated, reconstructed)


def read_examples(size: int, limit: int = 0) -> tuple[Examples, Examples]:
    """The training drawings, each on two backgrounds and once degraded, and the held-out ones, each on one background.

    A held-out pair whose concept no training picture shows in another style cannot be examined, and is left out.

    Raises:
      ValueError: a limit below two.
    """
    if limit and limit < 2:
        raise ValueError(f"limit {limit}: two pictures are the least that distances between sets can be told of.")
    rng = np.random.default_rng([_JUDGE_SEED, 1])
    items = loader.evaluation_items("train", image_size=size)
    training = _on_backgrounds(items * 2, rng)
    training.pictures[len(items) :] = degrade(training.pictures[len(items) :], rng)
    held_out = loader.evaluation_items("heldout", image_size=size)
    asked = _on_backgrounds(held_out, np.random.default_rng([_JUDGE_SEED, 2]))
    hands: dict[str, set[str]] = {}
    for concept, style in zip(training.labels.concepts, training.labels.styles, strict=True):
        hands.setdefault(concept, set()).add(style)
    usable = [
        index
        for index, (concept, style) in enumerate(zip(asked.labels.concepts, asked.labels.styles, strict=True))
        if hands.get(concept, set()) - judge.kin(style)
    ]
    if limit:
        usable = sorted(np.random.default_rng([_JUDGE_SEED, 3]).permutation(usable)[:limit].tolist())
    return training, asked.take(usable)


def _on_backgrounds(items: Sequence[loader.EvaluationItem], rng: np.random.Generator) -> Examples:
    colours = [list(BACKGROUNDS)[index] for index in rng.integers(len(BACKGROUNDS), size=len(items))]
    pairs = list(zip(items, colours, strict=True))
    described = [item.record.emoji for item in items]
    return Examples(
        pictures=np.stack([item.image(colour) for item, colour in pairs]),
        labels=judge.Labels(
            tuple(emoji.style for emoji in described),
            tuple(emoji.codepoints for emoji in described),
            tuple(emoji.group for emoji in described),
        ),
        names=tuple(emoji.label for emoji in described),
        backgrounds=tuple(colours),
        prompts=tuple(item.caption(colour) for item, colour in pairs),
    )


def generate(
    pipe: SanaPipeline, prompts: Sequence[str], *, seed: int, steps: int | None, guidance: float | None
) -> UInt8[np.ndarray, "N H W 3"]:
    """One picture per prompt; all noise of picture i depends on (seed, i) alone, however they are batched."""
    steps = pipe.defaults.num_inference_steps if steps is None else steps
    shape = pipe.latent_shape(pipe.default_height, pipe.default_width)
    parts = []
    for first in range(0, len(prompts), _BATCH):
        # The last batch is filled up, so that one program serves all.
        numbers = np.minimum(np.arange(first, first + min(_BATCH, len(prompts))), len(prompts) - 1)
        noise = {"latents": initial_noise(seed, numbers, shape)}
        if pipe.defaults.family == "sprint":
            noise["step_noise"] = step_noise(seed, numbers, steps, shape)
        drawn = pipe(
            [prompts[number] for number in numbers],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
            **noise,
        )
        parts.append(to_bytes(drawn)[: len(prompts) - first])
        logging.info("%d of %d pictures drawn", min(first + _BATCH, len(prompts)), len(prompts))
    return np.concatenate(parts)


def to_bytes(pictures: Float[np.ndarray, "*B H W 3"]) -> UInt8[np.ndarray, "*B H W 3"]:
    """0..1 -> 0..255, rounded."""
    return np.rint(np.clip(pictures, 0, 1) * 255).astype(np.uint8)


def measure(
    chief: judge.Judge,
    training: Examples,
    training_seen: features.Features,
    asked: Examples,
    generated: UInt8[np.ndarray, "N H W 3"],
    reconstructed: UInt8[np.ndarray, "N H W 3"],
) -> Result:
    """All measures of generated, real and reconstructed pictures of what was asked."""
    sets = {"reached": generated, "real": asked.pictures, "reconstructed": reconstructed}
    candidates = judge.draw_candidates(asked.labels, training.labels, _JUDGE_SEED)
    verdicts = {name: _verdict(chief, asked, pictures, candidates) for name, pictures in sets.items()}
    psnr = reconstruction.psnr(asked.pictures, reconstructed)

    compared = {name: verdicts[name] for name in ("reached", "real")}
    control = {
        name: shuffled_control(chief, verdict.seen, asked.labels, candidates) for name, verdict in compared.items()
    }
    closest = {name: nearest(verdict.seen.pooled, training_seen.pooled) for name, verdict in compared.items()}
    clean = training.take(range(len(training) // 2))
    reference = features.extract(clean.take(matched_sample(asked, clean)).pictures).pooled
    frechet = {name: frechet_distance(features.extract(sets[name]).pooled, reference) for name in compared}

    def percent(right: str, of: np.ndarray | slice = slice(None)) -> dict[str, float]:
        return {name: 100 * float(np.mean(getattr(verdict, right)[of])) for name, verdict in verdicts.items()}

    rows = (
        Row("autoencoder PSNR", "dB", float(psnr.mean()), bar=27.0),
        Row("style named right", "%", **percent("style_right"), bar=90.0),
        Row("concept first among 20", "%", **percent("concept_right"), bar=75.0),
        Row("background colour right", "%", **percent("background_right"), bar=95.0),
        Row(
            "control: shuffled prompts (chance 5 %)",
            "%",
            **{name: 100 * float(np.mean(values)) for name, values in control.items()},
        ),
        Row(
            "nearest training picture, median cosine distance",
            "",
            **{name: float(np.median(found.distance)) for name, found in closest.items()},
        ),
        Row(f"Frechet distance to {len(asked)} training pictures", "", **frechet),
    )
    by_style = {}
    for style in sorted(set(asked.labels.styles)):
        of = np.array(asked.labels.styles) == style
        by_style[style] = {
            "pictures": int(of.sum()),
            "autoencoder PSNR": float(psnr[of].mean()),
            "style named right": percent("style_right", of),
            "concept first among 20": percent("concept_right", of),
            "background colour right": percent("background_right", of),
        }
    details = {
        "pictures": len(asked),
        "training_pictures": len(training),
        "by_style": by_style,
        "nearest training picture": {
            name: {
                "cosine distance at 5, 25, 50, 75, 95 %": np.percentile(found.distance, [5, 25, 50, 75, 95]).tolist(),
                "shows": _share_of_kinds(asked, training, found.index),
            }
            for name, found in closest.items()
        },
        "each": _each(asked, verdicts["reached"], training, closest["reached"]),
    }
    return Result(rows, details, asked, generated)


@dataclasses.dataclass(frozen=True)
class _Verdict:
    """What the judge makes of N pictures."""

    seen: features.Features
    styles: Sequence[str]
    places: Int[np.ndarray, " N"]
    backgrounds: Sequence[str]
    style_right: Bool[np.ndarray, " N"]
    concept_right: Bool[np.ndarray, " N"]
    background_right: Bool[np.ndarray, " N"]


def _verdict(
    chief: judge.Judge, asked: Examples, pictures: UInt8[np.ndarray, "N H W 3"], candidates: Sequence[Sequence[str]]
) -> _Verdict:
    seen = features.extract(background.on_grey(pictures))
    styles, grounds = chief.name_styles(pictures), background.names(pictures)
    places = chief.rank_concepts(seen, asked.labels.styles, candidates)
    return _Verdict(
        seen=seen,
        styles=styles,
        places=places,
        backgrounds=grounds,
        style_right=np.array(styles) == np.array(asked.labels.styles),
        concept_right=places == 0,
        background_right=np.array(grounds) == np.array(asked.backgrounds),
    )


def _each(asked: Examples, verdict: _Verdict, training: Examples, found: Nearest) -> list[dict]:
    return [
        {
            "prompt": asked.prompts[i],
            "key": f"{asked.labels.concepts[i]}/{asked.labels.styles[i]}",
            "style seen": verdict.styles[i],
            "place of the concept": int(verdict.places[i]) + 1,
            "background seen": verdict.backgrounds[i],
            "nearest training picture": f"{training.labels.concepts[k]}/{training.labels.styles[k]}",
            "cosine distance": float(found.distance[i]),
        }
        for i, k in enumerate(found.index.tolist())
    ]


def shuffled_control(
    chief: judge.Judge, seen: features.Features, labels: judge.Labels, candidates: Sequence[Sequence[str]]
) -> np.ndarray:
    """Whether each picture is judged to show what *another* prompt asked for: at chance, unless the judge leaks the answer.

    Mean over several permutations of the prompts; a picture that gets a prompt of its own concept is left out.
    """
    rng = np.random.default_rng(_JUDGE_SEED)
    concepts = np.array(labels.concepts)
    right = []
    for _ in range(_SHUFFLES):
        order = rng.permutation(len(concepts))
        other = np.flatnonzero(concepts[order] != concepts)
        part = features.Features(*(values[other] for values in seen))
        prompts = order[other]
        places = chief.rank_concepts(part, [labels.styles[i] for i in prompts], [candidates[i] for i in prompts])
        right.append(places == 0)
    return np.concatenate(right)


def matched_sample(asked: Examples, training: Examples) -> list[int]:
    """As many training pictures as were asked for, each on one's background and in its style, none taken twice."""
    rng = np.random.default_rng(_JUDGE_SEED)
    styles, grounds = np.array(training.labels.styles), np.array(training.backgrounds)
    taken: list[int] = []
    for style, ground in zip(asked.labels.styles, asked.backgrounds, strict=True):
        fitting = np.setdiff1d(np.flatnonzero((styles == style) & (grounds == ground)), taken)
        if not len(fitting):  # a small set may lack the background
            fitting = np.setdiff1d(np.flatnonzero(styles == style), taken)
        taken.append(int(rng.choice(fitting)))
    return taken


def _share_of_kinds(asked: Examples, training: Examples, index: np.ndarray) -> dict[str, float]:
    concepts, styles = np.array(training.labels.concepts)[index], np.array(training.labels.styles)[index]
    same_concept = concepts == np.array(asked.labels.concepts)
    same_style = styles == np.array(asked.labels.styles)
    kinds = {
        "the same concept by another hand": same_concept & ~same_style,
        "another concept by the same hand": ~same_concept & same_style,
        "another concept by another hand": ~same_concept & ~same_style,
    }
    return {kind: float(share.mean()) for kind, share in kinds.items()}
