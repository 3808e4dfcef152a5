"""A judge of drawings: whose hand is it, and what does it show? It learns from real training pictures alone.

Both answers are linear in fixed features, so that the judge is fitted in closed form, the same every time:

* the style, by ridge regression on `descriptors` (colours, shading, margins);
* the concept, by the nearest of the candidates' mean vectors in a linear discriminant space of EfficientNet-Lite0's
  features, in which drawings of one concept by different hands lie together. A candidate is known by its real training
  pictures, those in the style asked for not among them: the true concept has none there, so no other may.

The candidates are the true concept and 19 others, at most half of them of its own Unicode group. Chance is 5 %.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

from sana_jax.evaluation import descriptors, features
from sana_jax.evaluation.nearest import unit

NUM_CANDIDATES = 20
_STYLE_RIDGE = 300.0
_CONCEPT_RIDGE = 0.1  # share of the mean within-concept variance
_CONCEPT_DIMENSIONS = 256
_KIN = dict.fromkeys(("fluent-3d", "fluent-flat"), frozenset({"fluent-3d", "fluent-flat"}))


@dataclasses.dataclass(frozen=True)
class Labels:
    """What is known of N pictures: the style's name, the concept's code points and its Unicode group."""

    styles: Sequence[str]
    concepts: Sequence[str]
    groups: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Judge:
    """A fitted judge. Made by `fit`.

    Attributes:
      styles: names, in the order of the style scores.
      labels: of the training pictures.
      style_map, concept_map: the linear maps and what is taken off the features before.
      vectors: the training pictures in the discriminant space, of length 1.
    """

    styles: tuple[str, ...]
    labels: Labels
    style_map: "LinearMap"
    concept_map: "LinearMap"
    vectors: Float[np.ndarray, "N K"]

    def name_styles(self, pictures: UInt8[np.ndarray, "M H W 3"]) -> list[str]:
        """The style each picture looks to be drawn in."""
        scores = self.style_map(descriptors.describe(pictures))
        return [self.styles[index] for index in scores.argmax(axis=1)]

    def rank_concepts(
        self, seen: features.Features, styles: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> Int[np.ndarray, " M"]:
        """The place (0 is first) that the first candidate takes among all, for each picture.

        Args:
          seen: features of the pictures on grey.
          styles: the style each picture was asked in, whose training pictures do not count.
          candidates: per picture, concepts; the first is the true one.

        Raises:
          ValueError: a candidate has no training picture in another style.
        """
        vectors = unit(self.concept_map(concept_input(seen)))
        means = {style: self._concept_means(style) for style in set(styles)}
        places = []
        for vector, style, concepts in zip(vectors, styles, candidates, strict=True):
            if unknown := [concept for concept in concepts if concept not in means[style]]:
                raise ValueError(f"candidate {unknown[0]} has no training picture in another style than {style}.")
            scores = [vector @ means[style][concept] for concept in concepts]
            places.append(sum(score >= scores[0] for score in scores[1:]))
        return np.array(places)

    def _concept_means(self, style: str) -> dict[str, Float[np.ndarray, " K"]]:
        """Direction of every concept's training pictures in other styles than those like `style`."""
        others = ~np.isin(self.labels.styles, list(kin(style)))
        concepts, member = np.unique(np.array(self.labels.concepts)[others], return_inverse=True)
        sums = np.zeros((len(concepts), self.vectors.shape[1]))
        np.add.at(sums, member, self.vectors[others])
        return dict(zip(concepts.tolist(), unit(sums), strict=True))


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """x -> ((x - mean) / scale) @ matrix + offset."""

    mean: Float[np.ndarray, " D"]
    scale: Float[np.ndarray, " D"]
    matrix: Float[np.ndarray, "D K"]
    offset: Float[np.ndarray, " K"]

    def __call__(self, x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N K"]:
        return ((x - self.mean) / self.scale) @ self.matrix + self.offset


def kin(style: str) -> frozenset[str]:
    """The styles whose drawings of a thing are nearly those of `style`, itself among them: fluent-flat copies fluent-3d."""
    return _KIN.get(style, frozenset({style}))


def fit(pictures: UInt8[np.ndarray, "N H W 3"], seen: features.Features, labels: Labels) -> Judge:
    """Fits a judge.

    Args:
      pictures: real training pictures, on any backgrounds.
      seen: features of the same pictures on grey.
      labels: of the same pictures.
    """
    styles = tuple(sorted(set(labels.styles)))
    targets = np.array(labels.styles)[:, None] == np.array(styles)
    style_map = fit_ridge(descriptors.describe(pictures), targets.astype(np.float64), _STYLE_RIDGE)
    x = concept_input(seen)
    concept_map = fit_discriminants(x, labels.concepts, _CONCEPT_RIDGE, _CONCEPT_DIMENSIONS)
    return Judge(styles, labels, style_map, concept_map, unit(concept_map(x)))


def concept_input(seen: features.Features) -> Float[np.ndarray, "N D"]:
    """The features that the concept is read from."""
    return np.concatenate([seen.pooled, seen.stages, seen.layout], axis=1)


def fit_ridge(x: Float[np.ndarray, "N D"], targets: Float[np.ndarray, "N K"], ridge: float) -> LinearMap:
    r"""Least squares with a penalty: $W = (X^T X + \lambda I)^{-1} X^T Y$ on standardised x and centred y."""
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-3
    z = ((x - mean) / scale).astype(np.float64)
    offset = targets.mean(axis=0)
    matrix = np.linalg.solve(z.T @ z + ridge * np.eye(z.shape[1]), z.T @ (targets - offset))
    return LinearMap(mean, scale, matrix, offset)


def fit_discriminants(x: Float[np.ndarray, "N D"], concepts: Sequence[str], ridge: float, dimensions: int) -> LinearMap:
    r"""Fisher's discriminants: the directions w with the greatest $w^T S_b w / w^T (S_w + \rho I) w$.

    $S_w$ is the covariance about the mean of a concept, to which the difference of the styles contributes most, $S_b$ that
    of the concepts' means, and $\rho$ is `ridge` times the mean of $S_w$'s diagonal. The directions are whitened by the
    denominator, which makes the inner product the one that discounts what differs between drawings of one thing.
    """
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-3
    z = ((x - mean) / scale).astype(np.float64)
    _, member = np.unique(np.array(concepts), return_inverse=True)
    centres = np.zeros((member.max() + 1, z.shape[1]))
    np.add.at(centres, member, z)
    centres /= np.bincount(member)[:, None]
    within = z - centres[member]
    s_within = within.T @ within / len(z)
    s_within += ridge * np.trace(s_within) / len(s_within) * np.eye(len(s_within))
    # With S_w = L L^T the problem is an ordinary one for L^-1 S_b L^-T = F F^T, F = L^-1 times the centres; its
    # eigenvectors are F v / sqrt(value) for those v of the smaller F^T F.
    lower = np.linalg.cholesky(s_within)
    factor = np.linalg.solve(lower, (centres - centres.mean(axis=0)).T / np.sqrt(len(centres)))
    values, v = np.linalg.eigh(factor.T @ factor)
    kept = [index for index in np.argsort(-values)[:dimensions] if values[index] > 1e-9 * values[-1]]
    directions = factor @ v[:, kept] / np.sqrt(values[kept])
    matrix = np.linalg.solve(lower.T, directions)
    return LinearMap(mean, scale, matrix, np.zeros(matrix.shape[1]))


def draw_candidates(labels: Labels, known: Labels, seed: int) -> list[list[str]]:
    """For each picture the true concept and 19 others, drawn without repetition among those the judge can know.

    Even-numbered distractors are of the true concept's group where it has enough members, so that a judge that sees no
    more than "a face" does not get by.

    Args:
      labels: of the pictures to be judged.
      known: of the training pictures.
      seed: of the draw; picture i's candidates depend on (seed, its concept and style) alone.
    """
    group_of = dict(zip(known.concepts, known.groups, strict=True))
    hands: dict[str, set[str]] = {}
    for concept, style in zip(known.concepts, known.styles, strict=True):
        hands.setdefault(concept, set()).add(style)
    out = []
    for style, concept, group in zip(labels.styles, labels.concepts, labels.groups, strict=True):
        rng = np.random.default_rng([seed, *f"{concept}/{style}".encode()])
        others = sorted(c for c in group_of if c != concept and hands[c] - kin(style))
        alike = [c for c in others if group_of[c] == group]
        near = [alike[i] for i in rng.permutation(len(alike))[: (NUM_CANDIDATES - 1) // 2]]
        rest = [c for c in others if c not in set(near)]
        far = [rest[i] for i in rng.permutation(len(rest))[: NUM_CANDIDATES - 1 - len(near)]]
        out.append([concept, *near, *far])
    return out
