"""What measured plans say of a table: exact on data that follow the model, and never below 0."""

import numpy as np
import pytest

from bitknap.allocation import CostTable, Units, formats
from bitknap.allocation.belief import Belief, effects


@pytest.fixture
def table():
    draw = np.random.default_rng(0)
    places = [(i, e, p) for i in range(3) for e in range(4) for p in ("gate", "down")]
    units = Units.build(
        layer=[i for i, _, _ in places],
        role=["routed"] * len(places),
        expert=[e for _, e, _ in places],
        projection=[p for _, _, p in places],
        rows=[16] * len(places),
        cols=[16] * len(places),
    )
    widths = formats((2, 3, 4), 8)
    cost = draw.lognormal(size=(len(units), 1)) * np.array([4.0**-item.bits for item in widths])
    return CostTable.from_arrays(cost, units=units, formats=widths)


def drawn(table, count, seed=1):
    shape = (count, len(table.units))
    return np.random.default_rng(seed).integers(0, len(table.formats), shape).astype(np.int32)


def losses(table, choices, factor):
    each = np.arange(len(table.units))
    return np.array([(table.cost * factor)[each, choice].sum() for choice in choices])


def test_losses_as_predicted_leave_costs_alone(table):
    choices = drawn(table, 12)
    belief = Belief.of(table, choices, losses(table, choices, np.ones(table.cost.shape)))
    np.testing.assert_allclose(belief.mean(), 1.0, atol=1e-6)


def test_a_layer_that_costs_more_is_found(table):
    truth = np.where(table.units.layer == 1, 1.8, 1.0)[:, None] * np.ones(table.cost.shape)
    choices = drawn(table, 60)
    factor = Belief.of(table, choices, losses(table, choices, truth)).mean()
    heavy = factor[table.units.layer == 1].mean()
    light = factor[table.units.layer != 1].mean()
    assert 1.3 < heavy / light < 1.8


def test_prediction_of_new_plans_gets_better(table):
    draw = np.random.default_rng(5)
    truth = np.exp(0.3 * draw.standard_normal(3))[table.units.layer][:, None] * 1.5
    truth = truth * np.ones(table.cost.shape)
    known, new = drawn(table, 40), drawn(table, 40, seed=2)
    factor = Belief.of(table, known, losses(table, known, truth)).mean()
    wanted = losses(table, new, truth)
    before = np.abs(losses(table, new, np.ones(table.cost.shape)) - wanted).mean()
    after = np.abs(losses(table, new, factor) - wanted).mean()
    assert after < 0.1 * before


def test_samples_spread_around_the_mean_and_are_positive(table):
    choices = drawn(table, 6)
    truth = 2 * np.ones(table.cost.shape)
    belief = Belief.of(table, choices, losses(table, choices, truth))
    generator = np.random.default_rng(3)
    samples = np.stack([belief.sample(generator) for _ in range(200)])
    assert (samples > 0).all()
    np.testing.assert_allclose(samples.mean(0).mean(), belief.mean().mean(), rtol=0.15)
    assert samples.std(0).mean() > 0


def test_one_plan_is_enough_and_forbidden_costs_play_no_part(table):
    cost = table.cost.copy()
    cost[0, 0] = np.inf
    held = CostTable.from_arrays(cost, units=table.units, formats=table.formats)
    choice = np.full((1, len(table.units)), 2, dtype=np.int32)
    belief = Belief.of(held, choice, np.array([3.0]))
    assert np.isfinite(belief.mean()).all()


def test_every_cost_has_one_effect_of_each_kind(table):
    for kind in effects(table):
        assert kind.of.shape == table.cost.shape
        assert kind.of.min() == 0
        assert kind.of.max() == kind.count - 1
