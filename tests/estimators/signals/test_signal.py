"""What scores become: a table, comparable numbers, one-line errors."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitknap.allocation import Budget, Format, Problem, Units, formats, solve
from bitknap.errors import InputError
from bitknap.estimators.costs.data_free import DataFree
from bitknap.estimators.signals.scored import Scored, centred, checked, standardised
from bitknap.estimators.signals.unit_statistics import (
    LEAST,
    by_expert,
    by_matrix,
    curvature,
    input_square,
    positive,
    rounding_error,
    routed,
)
from bitknap.estimators.sweep.in_memory import calibrate
from bitknap.quantization.stacks.grouping import stacks
from bitknap.testing import tiny_model
from bitknap.testing.evidence import random_windows, weights_alone

FORMATS = formats((2, 3, 4), (8, "row"), keep="fp32")


@dataclass(frozen=True)
class Given:
    """A signal whose scores were given."""

    values: tuple[float, ...]
    name = "given"
    needs: frozenset[str] = frozenset()

    def score(self, evidence):
        return np.array(self.values, dtype=np.float64)


@pytest.fixture(scope="module")
def case():
    model = tiny_model("qwen2_moe")
    bare = weights_alone(model, ("shared",), seed=0)
    seen = calibrate(model, bare.layout, random_windows(3))
    return SimpleNamespace(layout=bare.layout, bare=bare, seen=seen, count=len(bare.units))


def test_scored_multiplies_the_base(case):
    base = DataFree().estimate(case.bare, FORMATS)
    values = np.linspace(1, 3, case.count)
    table = Scored(Given(tuple(values)), 0.5).estimate(case.bare, FORMATS)
    np.testing.assert_allclose(table.cost, base.cost * np.sqrt(values / 2)[:, None])
    assert np.array_equal(table.nbytes, base.nbytes)
    assert not table.cost[:, -1].any()  # kept precisions cost nothing
    provenance = dict(table.provenance)
    assert (provenance["unit"], provenance["estimator"]) == ("score", "scored(given)")
    assert (provenance["exponent"], provenance["seed"]) == (0.5, 0)
    assert table.frequency is None


@pytest.mark.parametrize(("values", "exponent"), [("same", 3.0), ("rising", 0.0)])
def test_scores_without_say_leave_the_base(case, values, exponent):
    given = np.full(case.count, 7.0) if values == "same" else np.arange(1.0, case.count + 1)
    table = Scored(Given(tuple(given)), exponent).estimate(case.bare, FORMATS)
    np.testing.assert_allclose(table.cost, DataFree().estimate(case.bare, FORMATS).cost)


def test_a_sensitive_unit_gets_more_bits(case):
    high = np.ones(case.count)
    high[5] = 1e4
    plans = [
        solve(Problem(Scored(Given(tuple(v))).estimate(case.bare, FORMATS), [Budget.bits(5)])).plan
        for v in (np.ones(case.count), high, 1 / high)
    ]
    given = [plan.nbytes[5] for plan in plans]
    assert given[2] < given[0] < given[1]


def test_a_calibrated_table_knows_the_tokens(case):
    table = Scored(Given((1.0,) * case.count)).estimate(case.seen, FORMATS[:1])
    experts = routed(case.layout.units)
    assert table.frequency is not None
    assert (table.frequency[~experts] == 1).all()
    assert (table.frequency[experts] < 1).any()


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_bad_scores_are_refused(case, bad):
    values = [1.0] * case.count
    values[3] = bad
    label = case.layout.units.label(3)
    with pytest.raises(InputError) as caught:
        checked(Given(tuple(values)), case.bare)
    assert str(caught.value) == (f"given: {label} scores {bad}; a score is a finite number above 0")
    with pytest.raises(InputError, match=r"given: scores of shape \(2,\), expected"):
        Scored(Given((1.0, 1.0))).estimate(case.bare, FORMATS[:1])


def test_the_exponent_is_checked():
    with pytest.raises(InputError, match="exponent: nan is not a finite number"):
        Scored(Given(()), float("nan"))


def small_units():
    return Units.build(
        layer=[0, 0, 0, 0, 1, 1],
        role=["routed"] * 6,
        expert=[0, 0, 1, 1, 0, 0],
        projection=["up", "down"] * 3,
        rows=[4] * 6,
        cols=[4] * 6,
    )


def test_standardised_within_each_projection():
    # Up: logs 0, 1, 2 have mean 1 and deviation sqrt(2/3). Down: all alike.
    score = np.exp([0.0, 5, 1, 5, 2, 5])
    found = standardised(score, small_units())
    high = 1 / np.sqrt(2 / 3)
    np.testing.assert_allclose(found.values, [-high, 0, 0, 0, high, 0], atol=1e-12)
    assert found.constant == ("down",)
    # A factor changes nothing.
    again = standardised(9 * score, small_units()).values
    np.testing.assert_allclose(again, found.values, atol=1e-12)


def test_constant_scores_standardise_to_zero():
    found = standardised(np.full(6, 0.1), small_units())
    assert not found.values.any()
    assert found.constant == ("up", "down")
    with pytest.raises(InputError, match="must be 6 finite numbers above 0"):
        standardised(np.zeros(6), small_units())
    with pytest.raises(InputError, match="must be 6 finite numbers above 0"):
        standardised(np.ones(5), small_units())


def test_centred_takes_empty_groups():
    values, constant = centred(np.array([1.0, 3.0]), np.array([2, 2]))
    np.testing.assert_allclose(values, [-1, 1])
    assert constant == []


def test_positive_by_hand():
    np.testing.assert_allclose(positive(np.array([0.0, 2.0])), [LEAST, 2])
    assert positive(np.zeros(3)).tolist() == [1, 1, 1]


def test_statistics_reach_their_units(case):
    means = by_matrix(case.bare, lambda weights: weights.mean((1, 2)))
    for unit in (0, 7, case.count - 1):
        expected = float(case.bare.weights(np.array([unit])).double().mean())
        assert means[unit] == pytest.approx(expected, rel=1e-9)
    units = case.layout.units
    numbers = by_expert(case.seen, lambda layer: torch.arange(len(layer.count)), other=-5)
    experts = routed(units)
    assert np.array_equal(numbers[experts], units.expert[experts])
    assert (numbers[~experts] == -5).all()


def test_inputs_of_every_projection(case):
    units = case.layout.units
    for run in stacks(units):
        square = input_square(case.seen, run)
        assert square.shape == (len(run), units.cols[run[0]])
        assert (square > 0).all()


def test_what_is_missing_is_named(case):
    with pytest.raises(InputError, match=r"layer 0: no calibration pass saw it; calibrate"):
        by_expert(case.bare, lambda layer: layer.count)
    shared = np.flatnonzero(~routed(case.layout.units))[:1]
    with pytest.raises(InputError, match=r"role=shared .*: no calibration pass saw it"):
        input_square(case.bare, shared)
    with pytest.raises(InputError, match="gradients are recorded for routed experts only"):
        curvature(case.seen, shared)
    with pytest.raises(InputError, match="calibrate with curvature=True"):
        curvature(case.seen, stacks(case.layout.units)[0])
    with pytest.raises(InputError, match="keep-bf16 rounds nothing"):
        rounding_error(torch.ones(1, 2, 8), Format.keep("bf16"))
