"""The judge on synthetic vectors, where the right answers are known."""

import numpy as np
import pytest

from sana_jax.evaluation import features, judge

STYLES = ("noto", "twemoji", "fxemoji", "fluent-3d", "fluent-flat")


def labels(num_concepts=30):
    pairs = [(style, f"{concept:x}") for concept in range(num_concepts) for style in STYLES]
    groups = tuple("even" if int(concept, 16) % 2 == 0 else "odd" for _, concept in pairs)
    return judge.Labels(tuple(style for style, _ in pairs), tuple(concept for _, concept in pairs), groups)


def seen(vectors):
    """Vectors in the place of features, with nothing in the other parts."""
    empty = np.zeros((len(vectors), 1), np.float32)
    return features.Features(vectors.astype(np.float32), empty, empty)


@pytest.fixture(scope="module")
def world():
    """Vectors = concept + style + strong noise in two directions that tells nothing."""
    rng = np.random.default_rng(0)
    known = labels()
    concepts, styles = rng.normal(size=(30, 12)), rng.normal(size=(5, 12)) * 2
    nuisance = rng.normal(size=(2, 12)) * 6

    def draw(style, concept):
        base = concepts[int(concept, 16)] + styles[STYLES.index(style)]
        return base + rng.normal(size=2) @ nuisance + 0.05 * rng.normal(size=12)

    vectors = np.stack([draw(*pair) for pair in zip(known.styles, known.concepts, strict=True)])
    new = np.stack([draw(*pair) for pair in zip(known.styles, known.concepts, strict=True)])
    return known, vectors, new


def make_judge(known, vectors):
    concept_map = judge.fit_discriminants(judge.concept_input(seen(vectors)), known.concepts, 1e-3, 10)
    x = concept_map(judge.concept_input(seen(vectors)))
    return judge.Judge(STYLES, known, None, concept_map, x / np.linalg.norm(x, axis=1, keepdims=True))


def test_discriminants_find_the_concept_under_noise_that_hides_it(world):
    known, vectors, new = world
    candidates = judge.draw_candidates(known, known, seed=0)
    places = make_judge(known, vectors).rank_concepts(seen(new), known.styles, candidates)
    assert (places == 0).mean() > 0.95
    plain = judge.LinearMap(np.zeros(14), np.ones(14), np.eye(14), np.zeros(14))
    unit = judge.concept_input(seen(vectors))
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    raw = judge.Judge(STYLES, known, None, plain, unit).rank_concepts(seen(new), known.styles, candidates)
    assert (raw == 0).mean() < 0.6  # without them the noise decides


def test_a_judge_that_sees_nothing_ranks_the_concept_last(world):
    known, vectors, new = world
    candidates = judge.draw_candidates(known, known, seed=0)
    blind = judge.LinearMap(np.zeros(14), np.ones(14), np.zeros((14, 3)), np.ones(3))
    judged = judge.Judge(STYLES, known, None, blind, np.ones((len(vectors), 3)) / np.sqrt(3))
    places = judged.rank_concepts(seen(new), known.styles, candidates)
    assert (places == judge.NUM_CANDIDATES - 1).all()  # ties count against it


def test_pictures_in_the_style_asked_for_do_not_count(world):
    known, vectors, new = world
    judged = make_judge(known, vectors)
    for style, excluded in (("noto", {"noto"}), ("fluent-3d", {"fluent-3d", "fluent-flat"})):
        changed = judged.vectors.copy()
        changed[np.isin(known.styles, list(excluded))] = np.nan
        altered = judge.Judge(STYLES, known, None, judged.concept_map, changed)
        of_style = [i for i, name in enumerate(known.styles) if name == style]
        candidates = [judge.draw_candidates(known, known, seed=0)[i] for i in of_style]
        styles = [style] * len(of_style)
        part = seen(new[of_style])
        np.testing.assert_array_equal(
            altered.rank_concepts(part, styles, candidates), judged.rank_concepts(part, styles, candidates)
        )


def test_a_candidate_known_in_the_asked_style_alone_is_an_error(world):
    known, vectors, new = world
    judged = make_judge(known, vectors)
    alone = judge.Labels(
        tuple("noto" if concept == "3" else style for style, concept in zip(known.styles, known.concepts, strict=True)),
        known.concepts,
        known.groups,
    )
    judged = judge.Judge(STYLES, alone, None, judged.concept_map, judged.vectors)
    with pytest.raises(ValueError, match="candidate 3 has no training picture in another style than noto"):
        judged.rank_concepts(seen(new[:1]), ["noto"], [["3", "4"]])


def test_candidates_are_the_true_concept_and_nineteen_different_others():
    known = labels()
    for concept, candidates in zip(known.concepts, judge.draw_candidates(known, known, seed=0), strict=True):
        assert candidates[0] == concept and len(candidates) == len(set(candidates)) == 20


def test_nine_distractors_are_of_the_concepts_own_group():
    known = labels(60)
    for concept, candidates in zip(known.concepts, judge.draw_candidates(known, known, seed=0), strict=True):
        alike = [c for c in candidates[1:10] if int(c, 16) % 2 == int(concept, 16) % 2]
        assert len(alike) == 9


def test_candidates_depend_on_the_pair_and_the_seed_alone():
    known = labels()
    all_ = judge.draw_candidates(known, known, seed=0)
    one = judge.Labels(known.styles[7:8], known.concepts[7:8], known.groups[7:8])
    assert judge.draw_candidates(one, known, seed=0) == all_[7:8]
    assert judge.draw_candidates(one, known, seed=1) != all_[7:8]


def test_the_ridge_is_the_minimum_of_the_penalised_squares():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(40, 2))
    fitted = judge.fit_ridge(x, y, 3.0)
    z = (x - x.mean(0)) / (x.std(0) + 1e-3)

    def loss(matrix):
        return ((z @ matrix - (y - y.mean(0))) ** 2).sum() + 3 * (matrix**2).sum()

    best = loss(fitted.matrix)
    for _ in range(20):
        assert loss(fitted.matrix + 1e-2 * rng.normal(size=fitted.matrix.shape)) > best
    np.testing.assert_allclose(fitted(x), z @ fitted.matrix + y.mean(0))


def test_discriminants_are_whitened_by_the_variation_within_concepts(world):
    known, vectors, _ = world
    fitted = judge.fit_discriminants(vectors, known.concepts, 1e-12, 10)
    z = (vectors - fitted.mean) / fitted.scale
    projected = z @ fitted.matrix
    within = projected - np.stack(
        [projected[np.array(known.concepts) == concept].mean(0) for concept in known.concepts]
    )
    np.testing.assert_allclose(within.T @ within / len(within), np.eye(fitted.matrix.shape[1]), atol=1e-3)
