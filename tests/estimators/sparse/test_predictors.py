"""Predictors from sparse samples: what each learns, and which ranks best on a separable table."""

import sys

import numpy as np
import pytest

from bitknap.allocation import formats
from bitknap.errors import InputError
from bitknap.estimators.group_kl.regression import rank_correlation
from bitknap.estimators.sparse.cell_choice import AtRandom, ByDepth
from bitknap.estimators.sparse.cell_features import Antecedents
from bitknap.estimators.sparse.fuzzy_rules import FuzzyRules
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.estimators.sparse.predictors import GradientBoosting, LogLinear, Residual, left_out
from bitknap.testing import routed_units

LAYERS, EXPERTS = 32, 8
FORMATS = formats((1, 2, 3, 4), 64)
CURVE = np.array([0.0, -1.0, -2.3, -3.7])
ORIGIN = {"model": "m", "method": "rtn", "text": "t", "tokens": 1, "seed": 0}
NAMES = ("distortion", "activation", "depth", "projection")


class Table:
    """A table such as Mixtral's (methods.md#mc-moe): layer × bit + unit, 3 % noise.

    Units differ by `spread`; a share `known` of it can be read off their activation.
    """

    def __init__(self, *, spread, known, seed=0):
        generator = np.random.default_rng(seed)
        layer, projection = np.indices((LAYERS, EXPERTS, 3))[[0, 2]].reshape(2, -1)
        count = len(layer)
        self.units = routed_units(LAYERS, EXPERTS, ("gate", "up", "down"), rows=64, cols=64)
        activation, rest = generator.normal(size=(2, count))
        unit = spread * (known * activation + np.sqrt(1 - known**2) * rest)
        place = np.cumsum(generator.normal(0.1, 0.3, LAYERS))[:, None]
        curves = place + CURVE * (1 + 0.1 * generator.normal(size=(LAYERS, 1)))
        kind = np.array([0.0, 0.1, 0.6])[projection]
        self.logs = curves[layer] + (kind + unit)[:, None]
        self.logs += 0.03 * generator.normal(size=self.logs.shape) - 8
        values = np.empty((count, 4, 4))
        values[:, :, 0] = -2 * np.arange(1.0, 5)
        values[:, :, 1] = activation[:, None]
        values[:, :, 2] = (layer[:, None] + 1) / LAYERS
        values[:, :, 3] = projection[:, None]
        self.antecedents = Antecedents(
            names=NAMES,
            values=values,
            discrete=frozenset({"projection"}),
            free=frozenset({"depth"}),
        )

    def samples(self, anchors=None, share=0.1, seed=0):
        """Return samples of a share of the cells."""
        free = np.ones(self.logs.shape, dtype=np.bool_)
        count = round(share * free.size)
        cells = (anchors or AtRandom()).pick(self.units, free, None, count, seed)
        return LossSamples(
            units=self.units,
            formats=FORMATS,
            unit=cells // 4,
            column=cells % 4,
            loss=np.exp(self.logs.ravel()[cells]),
            provenance=ORIGIN,
        )

    def judge(self, predictor, samples):
        """Return the rank correlation, rms error and rms error over deviation, not measured."""
        fitted = predictor.fit(samples, self.antecedents)
        mean, spread = fitted.logs(self.antecedents)
        rest = np.ones(self.logs.shape, dtype=np.bool_)
        rest[samples.unit, samples.column] = False
        error = (mean - self.logs)[rest]
        rank = rank_correlation(mean[rest], self.logs[rest])
        return rank, np.sqrt(np.mean(error**2)), np.sqrt(np.mean((error / spread[rest]) ** 2))


@pytest.fixture(scope="module")
def table():
    return Table(spread=0.08, known=0.7)


@pytest.fixture(scope="module")
def uneven():
    return Table(spread=0.3, known=0.95)


def test_a_tenth_of_a_separable_table_ranks_the_rest(table):
    samples = table.samples()
    assert table.judge(LogLinear(), samples)[0] > 0.98
    assert table.judge(Residual(), samples)[0] > 0.98
    rules, inverse = (table.judge(FuzzyRules(kind=kind), samples) for kind in ("tfri", "idw"))
    assert inverse[0] < min(0.98, rules[0])
    assert inverse[1] > 1.2 * rules[1]


def test_slopes_help_fuzzy_rules(table, uneven):
    for case in (table, uneven):
        samples = case.samples()
        weighted, plain = FuzzyRules(), FuzzyRules(weighted=False)
        assert case.judge(weighted, samples)[1] < 0.85 * case.judge(plain, samples)[1]


def test_rules_read_what_units_differ_by(uneven):
    samples = uneven.samples()
    flat, fuzzy = uneven.judge(LogLinear(), samples), uneven.judge(Residual(), samples)
    assert fuzzy[0] > flat[0] + 0.005
    assert fuzzy[1] < 0.75 * flat[1]


@pytest.mark.slow
@pytest.mark.parametrize("predictor", [LogLinear(), Residual(), FuzzyRules()], ids=repr)
def test_deviations_are_those_of_the_errors(predictor, table, uneven):
    for case in (table, uneven):
        assert 0.6 < case.judge(predictor, case.samples())[2] < 1.4
        # Layers left out one at a time are nearer to their neighbours than long gaps are.
        assert 0.6 < case.judge(predictor, case.samples(ByDepth()))[2] < 2.2


def test_layers_without_samples_lie_between_their_neighbours(table):
    samples = table.samples(ByDepth())
    assert len(set(samples.units.layer[samples.unit].tolist())) < LAYERS
    assert table.judge(LogLinear(), samples)[0] > 0.96
    fitted = LogLinear().fit(samples, table.antecedents)
    assert set(fitted.distance().tolist()) == {0, 1, 2}
    assert (np.diff(fitted.deviations) >= 0).all()


def test_a_third_of_a_table_gives_the_rest_to_its_noise(table):
    samples = table.samples(share=0.32)
    fitted = LogLinear().fit(samples, table.antecedents)
    mean, _ = fitted.logs(table.antecedents)
    assert np.std(mean - table.logs) < 0.06
    assert np.exp(mean) == pytest.approx(fitted.predict(table.antecedents)[0])


def test_no_other_effects_fit_better(table):
    samples = table.samples()
    model = LogLinear()
    fitted = model.fit(samples, table.antecedents)
    left = samples.logs - fitted.shared()[samples.unit, samples.column]
    count = np.bincount(samples.unit, minlength=len(table.units))
    sums = np.bincount(samples.unit, left, minlength=len(table.units))
    assert fitted.coefficients[-1] == pytest.approx(sums / (count + model.unit))
    # At the optimum every effect times its penalty is the sum of what is left of its cells.
    left = left - fitted.coefficients[-1][samples.unit]
    sums = np.bincount(samples.column, left, minlength=4)
    assert fitted.coefficients[1] * model.main == pytest.approx(sums, abs=1e-8)
    cell = table.units.layer[samples.unit] * 4 + samples.column
    sums = np.bincount(cell, left, minlength=LAYERS * 4)
    assert fitted.coefficients[4] * model.interaction == pytest.approx(sums, abs=1e-8)
    steps = np.diff(fitted.coefficients[2], prepend=0)
    above = np.cumsum(np.bincount(table.units.layer[samples.unit], left, LAYERS)[::-1])[::-1]
    assert steps * model.main == pytest.approx(above, abs=1e-8)


def test_fewer_samples_than_effects_is_said(table):
    few = LogLinear().fit(table.samples(share=0.02), table.antecedents)
    assert few.note.startswith("61 samples for ")
    assert few.note.endswith(" effects: the ridge shrinks those it cannot tell apart")


@pytest.mark.parametrize("predictor", [LogLinear(), Residual()], ids=repr)
def test_one_sample_is_the_answer_everywhere(predictor, table):
    one = table.samples(share=1 / table.logs.size)
    mean, spread = predictor.fit(one, table.antecedents).predict(table.antecedents)
    assert mean == pytest.approx(np.full(mean.shape, one.loss[0]))
    assert np.isfinite(spread).all()


@pytest.mark.slow
def test_boosted_trees_learn_the_table(table):
    pytest.importorskip("sklearn")
    trees = GradientBoosting(trees=40)
    rank, _, sure = table.judge(trees, table.samples())
    assert rank > 0.97
    assert 0.5 < sure < 1.5
    first, _ = trees.fit(table.samples(), table.antecedents).predict(table.antecedents)
    again, _ = trees.fit(table.samples(), table.antecedents).predict(table.antecedents)
    assert np.array_equal(first, again)


def test_without_scikit_learn_trees_say_so(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(InputError, match="gradient boosting needs scikit-learn, which is not"):
        GradientBoosting().fit(table.samples(), table.antecedents)


def test_left_out_values_are_predicted_without_their_group():
    values = np.array([1.0, 1, 2, 2, 3, 3])
    groups = np.array([0, 0, 1, 1, 2, 2])

    def learn(kept):
        assert not any(kept[groups == g].any() != kept[groups == g].all() for g in range(3))
        return np.full(6, values[kept].mean())

    assert left_out(values, groups, learn) == pytest.approx([1.5, 1.5, 0, 0, -1.5, -1.5])
    assert left_out(values, np.zeros(6, dtype=int), learn) == pytest.approx([1, 1, 0, 0, -1, -1])


def test_penalties_are_above_zero():
    with pytest.raises(InputError) as error:
        LogLinear(unit=0)
    assert str(error.value) == "unit: 0 is not above 0; use 1e-6 for almost no shrinkage"
    with pytest.raises(InputError, match="trees: 0 is not a whole number of at least 1"):
        GradientBoosting(trees=0)
