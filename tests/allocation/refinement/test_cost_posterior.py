"""What measured plans say of a table: exact on data that follow the model, and never below 0."""

import numpy as np
import pytest

from bitknap.allocation import CostTable, formats
from bitknap.allocation.refinement.cost_posterior import Groups, Posterior, kinds_of
from bitknap.testing import random_table, routed_units


@pytest.fixture
def table():
    return random_table(routed_units(3, 4), formats((2, 3, 4), 8))


def drawn(table, count, seed=1):
    shape = (count, len(table.units))
    return list(np.random.default_rng(seed).integers(0, len(table.formats), shape).astype(np.int32))


def losses(table, choices, factor):
    each = np.arange(len(table.units))
    return np.array([(table.cost * factor)[each, choice].sum() for choice in choices])


def test_losses_as_predicted_leave_costs_alone(table):
    choices = drawn(table, 12)
    posterior = Posterior.of(table, choices, losses(table, choices, np.ones(table.cost.shape)))
    np.testing.assert_allclose(posterior.mean(), 1.0, atol=1e-6)


def test_a_layer_that_costs_more_is_recognised(table):
    truth = np.where(table.units.layer == 1, 1.8, 1.0)[:, None] * np.ones(table.cost.shape)
    choices = drawn(table, 60)
    factor = Posterior.of(table, choices, losses(table, choices, truth)).mean()
    heavy = factor[table.units.layer == 1].mean()
    light = factor[table.units.layer != 1].mean()
    assert 1.3 < heavy / light < 1.8


def test_prediction_of_new_plans_gets_better(table):
    draw = np.random.default_rng(5)
    truth = np.exp(0.3 * draw.standard_normal(3))[table.units.layer][:, None] * 1.5
    truth = truth * np.ones(table.cost.shape)
    known, new = drawn(table, 40), drawn(table, 40, seed=2)
    factor = Posterior.of(table, known, losses(table, known, truth)).mean()
    wanted = losses(table, new, truth)
    before = np.abs(losses(table, new, np.ones(table.cost.shape)) - wanted).mean()
    after = np.abs(losses(table, new, factor) - wanted).mean()
    assert after < 0.1 * before


def test_samples_spread_around_the_mean_and_are_positive(table):
    choices = drawn(table, 6)
    truth = 2 * np.ones(table.cost.shape)
    posterior = Posterior.of(table, choices, losses(table, choices, truth))
    generator = np.random.default_rng(3)
    samples = np.stack([posterior.sample(generator) for _ in range(200)])
    assert (samples > 0).all()
    np.testing.assert_allclose(samples.mean(0).mean(), posterior.mean().mean(), rtol=0.15)
    assert samples.std(0).mean() > 0


def test_one_plan_is_enough_and_forbidden_costs_play_no_part(table):
    cost = table.cost.copy()
    cost[0, 0] = np.inf
    held = CostTable.from_arrays(cost, units=table.units, formats=table.formats)
    choice = [np.full(len(table.units), 2, dtype=np.int32)]
    posterior = Posterior.of(held, choice, np.array([3.0]))
    assert np.isfinite(posterior.mean()).all()


def test_every_cost_has_one_effect_of_each_kind(table):
    for kind in kinds_of(table, drawn(table, 1)[0]):
        assert kind.factor(np.zeros(kind.count)).sum() == 0
        if isinstance(kind, Groups):
            assert kind.of.shape == table.cost.shape
            assert kind.of.min() == 0
            assert kind.of.max() == kind.count - 1


def test_what_two_layers_do_to_each_other_is_found(table):
    each, layer = np.arange(len(table.units)), table.units.layer

    def loss(choice):
        sums = np.bincount(layer, weights=table.cost[each, choice])
        return sums.sum() + 1.5 * np.sqrt(sums[0] * sums[1])

    choices = drawn(table, 80)
    posterior = Posterior.of(table, choices, np.array([loss(choice) for choice in choices]))
    factor = posterior.mean()[each, choices[0]]
    means = [factor[layer == number].mean() for number in range(3)]
    assert min(means[:2]) > means[2] + 0.2


def test_slopes_of_pairs_are_those_of_their_sums(table):
    choice = drawn(table, 1)[0]
    *_, pairs = kinds_of(table, choice)
    effects = np.array([0.5, -0.2])
    slope = pairs.factor(effects)[:, 0]
    each = np.arange(len(choice))
    for unit in (0, 9, 23):
        step = 1e-6 * table.cost[unit, choice[unit]]
        more = table.cost.copy()
        more[each[unit], choice[unit]] += step
        change = effects @ (pairs.sums(more, choice) - pairs.sums(table.cost, choice)) / step
        np.testing.assert_allclose(change, slope[unit], rtol=1e-4)
