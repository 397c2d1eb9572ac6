"""Fuzzy interpolation: the sets, the rules, and what they answer."""

import numpy as np
import pytest

from bitknap.allocation import Format, Units
from bitknap.errors import InputError
from bitknap.estimators.sparse import fuzzy_rules
from bitknap.estimators.sparse.cell_features import Antecedents
from bitknap.estimators.sparse.fuzzy_rules import FuzzyRules
from bitknap.estimators.sparse.fuzzy_sets import (
    defuzzified,
    deviation,
    membership,
    move_ratio,
    moved,
    representative,
    scale_ratio,
    scaled,
    triangle,
)
from bitknap.estimators.sparse.measured_cells import LossSamples

ORIGIN = {"model": "m", "method": "rtn", "text": "t", "tokens": 1, "seed": 0}
TFRI = FuzzyRules(neighbours=3, weighted=False)
WEIGHTED = FuzzyRules(neighbours=3)
IDW = FuzzyRules(kind="idw", neighbours=3)


def rules(points, values, queries, **kinds):
    """Return samples of log losses `values` at `points`, and the antecedents of `queries` after.

    The units are the points and then the queries; there is one format.
    """
    every = np.concatenate([np.atleast_2d(points), np.atleast_2d(queries)])
    count = len(values)
    samples = LossSamples(
        units=Units.anonymous(len(every)),
        formats=(Format.made_up(0),),
        unit=np.arange(count),
        column=np.zeros(count, dtype=int),
        loss=np.exp(values),
        provenance=ORIGIN,
    )
    names = tuple(f"x{i}" for i in range(every.shape[1]))
    return samples, Antecedents(names=names, values=every[:, None, :], **kinds)


def answers(predictor, points, values, queries, **kinds):
    samples, antecedents = rules(points, values, queries, **kinds)
    mean, spread = predictor.fit(samples, antecedents).logs(antecedents)
    return mean[len(values) :, 0], spread[len(values) :, 0]


@pytest.fixture
def sets():
    return np.sort(np.random.default_rng(0).normal(size=(50, 3)), axis=-1)


def test_scaling_and_moving_leave_the_representative_value(sets):
    ratio = np.random.default_rng(1).uniform(-1, 1, 50)
    wide = scaled(sets, 2 + ratio)
    assert np.ptp(wide, axis=1) == pytest.approx((2 + ratio) * np.ptp(sets, axis=1))
    shifted = moved(sets, ratio)
    for found in (wide, shifted):
        assert representative(found) == pytest.approx(representative(sets))
        assert (np.diff(found, axis=1) >= -1e-12).all()


def test_scale_and_move_turn_a_set_into_any_other_of_its_representative_value(sets):
    target = np.sort(np.random.default_rng(2).normal(size=sets.shape), axis=-1)
    target += (representative(sets) - representative(target))[:, None]
    wide = scaled(sets, scale_ratio(sets, target))
    found = moved(wide, move_ratio(wide, target))
    # A move is clipped where the other set's peak lies further out than any move reaches.
    reached = np.abs(move_ratio(wide, target)) < 1
    assert reached.sum() > 20
    assert found[reached] == pytest.approx(target[reached])


def test_representative_value_is_the_centroid_of_scikit_fuzzy(sets):
    for corners in sets[:5]:
        assert defuzzified(corners) == pytest.approx(float(representative(corners)))
        assert defuzzified(corners, "mom") == pytest.approx(corners[1])
        assert membership(corners, corners).tolist() == [0, 1, 0]
        # max(0, 1 - |x - c| / w) of a symmetric set, as published
        x = np.linspace(-3, 3, 7)
        published = np.maximum(0, 1 - np.abs(x - 0.5) / 2)
        assert membership(x, triangle(np.array(0.5), 2.0)) == pytest.approx(published)


def test_deviation_is_that_of_the_triangular_density():
    assert deviation(np.array([-1.0, 0, 1])) == pytest.approx(1 / np.sqrt(6))
    assert deviation(np.array([0.0, 0, 1])) == pytest.approx(1 / np.sqrt(18))


@pytest.mark.parametrize("predictor", [TFRI, WEIGHTED], ids=repr)
def test_a_rule_that_is_hit_gives_its_consequent(predictor):
    generator = np.random.default_rng(0)
    # Few distinct values, so that rules share antecedents.
    points = np.unique(generator.integers(0, 4, (30, 3)), axis=0).astype(float)
    values = generator.normal(size=len(points))
    found, _ = answers(predictor, points, values, points, discrete=frozenset({"x2"}))
    assert found == pytest.approx(values)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_two_rules_are_a_straight_line(size):
    # Each antecedent moves the consequent by the same share of its range.
    points = np.array([np.zeros(size), 2.0 ** np.arange(size)])
    values = np.array([1.0, 4.0])
    share = np.random.default_rng(0).uniform(-2, 3, (9, size))
    found, _ = answers(FuzzyRules(neighbours=2, weighted=False), points, values, share * points[1])
    assert found == pytest.approx(1 + 3 * share.mean(axis=1))


def test_weighted_rules_are_exact_on_any_plane():
    generator = np.random.default_rng(0)
    points, queries = generator.uniform(size=(40, 3)), generator.uniform(-0.5, 1.5, (60, 3))
    slopes = np.array([2.0, 0.3, 1.0])
    found, _ = answers(FuzzyRules(), points, points @ slopes, queries)
    assert found == pytest.approx(queries @ slopes, abs=0.01)


def toy(predictor, sign=-1.0):
    """Return the mean absolute error of y = -2b + v from 60 rules (methods.md#fuzzy-rules)."""
    errors = []
    for seed in range(5):
        generator = np.random.default_rng(seed)
        b, v = generator.uniform(1, 4, 260), generator.uniform(0, 3, 260)
        x, y = np.stack([sign * b, v], axis=1), -2 * b + v
        if predictor.kind == "idw":
            samples, antecedents = rules(x[:60], y[:60], x[60:])
            fitted = predictor.fit(samples, antecedents, samples.logs)
            found = fitted.logs(antecedents)[0][60:, 0]
        else:
            found, _ = answers(predictor, x[:60], y[:60], x[60:])
        errors.append(np.abs(found - y[60:]).mean())
    return float(np.mean(errors))


def test_orientation_matters_and_so_do_slopes():
    inverse, plain = toy(IDW), toy(TFRI)
    assert toy(WEIGHTED) < 0.01 < plain < 0.7 * inverse
    # Un-oriented bits shift the wrong way: worse than no shift at all.
    assert toy(TFRI, sign=1.0) > 1.1 * inverse
    # A slope that may not be negative is none: still better than the wrong sign.
    assert toy(WEIGHTED, sign=1.0) < toy(TFRI, sign=1.0)


def test_a_direction_can_be_learned():
    generator = np.random.default_rng(0)
    points = generator.uniform(size=(40, 2))
    values, queries = points @ [-3.0, 1.0], np.array([[1.5, 0.5]])
    for predictor in (TFRI, WEIGHTED):
        bound, _ = answers(predictor, points, values, queries)
        free, _ = answers(predictor, points, values, queries, free=frozenset({"x0"}))
        assert abs(free[0] + 4) < abs(bound[0] + 4)
        assert free[0] < values.min() < bound[0]  # only the free one extrapolates


def test_categories_share_rules_when_weighted():
    # Category 1 costs 2 more, and was only measured at small x.
    x = np.linspace(0, 1, 11)
    points = np.concatenate([np.stack([x, 0 * x], 1), [[0.0, 1.0], [0.1, 1.0]]])
    values = points @ [3.0, 2.0]
    query = np.array([[0.9, 1.0]])
    kinds = {"discrete": frozenset({"x1"})}
    found, _ = answers(WEIGHTED, points, values, query, **kinds)
    assert found == pytest.approx([4.7], abs=0.05)
    inverse, _ = answers(IDW, points, values, query, **kinds)
    assert abs(inverse[0] - np.log(np.exp(4.7))) > 0.5


def test_a_category_without_a_sample_takes_the_mean_effect():
    points = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1]])
    found, _ = answers(
        WEIGHTED, points, points @ [1.0, 2.0], [[0.5, 7.0]], discrete=frozenset({"x1"})
    )
    assert found == pytest.approx([1.5], abs=0.01)


def test_published_inference_by_hand():
    # Two rules at 0 and 1, standard deviation 0.5: distances 0.5 and 1.5, weights 3/4 and 1/4.
    found = FuzzyRules(kind="idw", neighbours=2)
    samples, antecedents = rules([[0.0], [1.0]], np.log([4.0, 8.0]), [[0.25], [9.0]])
    mean, spread = found.fit(samples, antecedents).predict(antecedents)
    assert mean[2, 0] == pytest.approx(5, rel=1e-5)
    assert spread[2, 0] == pytest.approx(np.sqrt(0.75 * 1 + 0.25 * 9), rel=1e-5)
    assert mean[0, 0] == pytest.approx(4, rel=1e-5)
    assert 4 < mean[3, 0] < 8  # never beyond what was measured
    log_mean, _ = found.fit(samples, antecedents).logs(antecedents)
    assert np.exp(log_mean) == pytest.approx(mean)


def test_a_category_lies_at_distance_one_as_published():
    # Number at 0 of standard deviation 1 / 2 away by 1 (distance 2); category away by 1.
    points = np.array([[1.0, 0], [0.0, 1]])
    samples, antecedents = rules(
        points, np.log([3.0, 6.0]), [[0.0, 0.0]], discrete=frozenset({"x1"})
    )
    mean, _ = FuzzyRules(kind="idw").fit(samples, antecedents).predict(antecedents)
    assert mean[2, 0] == pytest.approx((3 / 2 + 6 / 1) / (1 / 2 + 1 / 1), rel=1e-5)


@pytest.mark.parametrize("predictor", [TFRI, WEIGHTED], ids=repr)
def test_spread_grows_away_from_the_rules(predictor):
    generator = np.random.default_rng(0)
    points = generator.uniform(size=(40, 1))
    values = points[:, 0] + generator.normal(0, 0.1, 40)
    _, spread = answers(predictor, points, values, [[0.5], [1.5], [3.0]])
    assert (np.diff(spread) > 0).all()
    assert spread[0] > 0.05


def test_spread_counts_the_error_of_the_measurement():
    points = np.array([[0.0], [1.0], [2.0]])
    samples, antecedents = rules(points, points[:, 0], points)
    noisy = LossSamples(
        units=samples.units,
        formats=samples.formats,
        unit=samples.unit,
        column=samples.column,
        loss=samples.loss,
        error=0.5 * samples.loss,
        provenance=ORIGIN,
    )
    sure = WEIGHTED.fit(samples, antecedents).logs(antecedents)[1]
    unsure = WEIGHTED.fit(noisy, antecedents).logs(antecedents)[1]
    assert unsure[:3] == pytest.approx(np.hypot(sure[:3], 0.5))


@pytest.mark.parametrize("predictor", [TFRI, WEIGHTED, IDW], ids=repr)
@pytest.mark.parametrize("count", [1, 2])
def test_hardly_any_rules_still_answer(predictor, count):
    found, spread = answers(predictor, [[0.0], [1.0]][:count], np.arange(count) + 1.0, [[0.5]])
    assert np.isfinite(found).all() and np.isfinite(spread).all()
    # Rules that all look alike have nothing to go by but their mean.
    found, _ = answers(predictor, np.zeros((count, 1)), np.ones(count), [[5.0]])
    assert found == pytest.approx([1.0])


def test_chunks_do_not_show(monkeypatch):
    generator = np.random.default_rng(0)
    points, queries = generator.uniform(size=(30, 2)), generator.uniform(size=(100, 2))
    for predictor in (TFRI, WEIGHTED, IDW):
        whole = answers(predictor, points, points.sum(1), queries)
        with monkeypatch.context() as patch:
            patch.setattr(fuzzy_rules, "_CHUNK", 7)
            parts = answers(predictor, points, points.sum(1), queries)
        assert np.array_equal(whole, parts)


def test_wrong_rules_are_refused():
    with pytest.raises(InputError, match="kind 'kh' is unknown; one of tfri, idw"):
        FuzzyRules(kind="kh")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="neighbours: 0 is not a whole number of at least 1"):
        FuzzyRules(neighbours=0)
    with pytest.raises(InputError, match="a has NaN or inf; give finite numbers"):
        Antecedents(names=("a",), values=np.full((2, 1, 1), np.nan))
    with pytest.raises(InputError, match="antecedent 'b' is unknown; one of a"):
        Antecedents(names=("a",), values=np.zeros((2, 1, 1)), free=frozenset({"b"}))
    with pytest.raises(InputError, match=r"expected .units, formats, 2. and distinct names"):
        Antecedents(names=("a", "a"), values=np.zeros((2, 1, 2)))
    samples, _ = rules([[0.0]], np.zeros(1), [[0.0]])
    other = Antecedents(names=("a",), values=np.zeros((5, 1, 1)))
    with pytest.raises(InputError, match=r"they cover 5 units × 1 formats, the samples 2 × 1"):
        WEIGHTED.fit(samples, other)
