"""MxMoE's product of loss and time, and equal budgets for layers."""

import math

import numpy as np
import pytest

from bitknap.allocation import (
    Budget,
    CostTable,
    Knapsack,
    Limit,
    Problem,
    formats,
    profile,
    solve,
)
from bitknap.allocation.published import MxMoe, PerLayer
from bitknap.errors import InfeasibleError, InputError

LOW, MIDDLE, HIGH = formats(bits=(2, 3, 4), group_size=64)


def timed(table: CostTable, bits: float, seed: int = 0) -> Problem:
    """A memory limit, and times that rise and fall with bits."""
    generator = np.random.default_rng(seed)
    times = generator.integers(1, 30, table.cost.shape).astype(float)
    return Problem(table, [Budget.bits(bits), Limit("time", times, math.inf)])


def test_the_ends_of_the_exponent_are_loss_alone_and_time_alone(model):
    problem = timed(model(), 3.5)
    assert np.array_equal(solve(problem, MxMoe(exponent=1)).choice, solve(problem).choice)
    times = problem.weights[1]
    fastest = solve(problem, MxMoe(exponent=0))
    swapped = CostTable.from_arrays(times, problem.table.nbytes)
    limit = Limit("memory", problem.weights[0], problem.bounds[0])
    assert times[np.arange(36), fastest.choice].sum() == solve(Problem(swapped, limit)).cost


def test_more_weight_on_the_time_takes_less_time(model):
    problem = timed(model(), 3.5)
    plans = [solve(problem, MxMoe(exponent=r)) for r in (1, 0.9, 0.75, 0.5, 0.25, 0)]
    times = [float(problem.weights[1][np.arange(36), plan.choice].sum()) for plan in plans]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]
    costs = [plan.cost for plan in plans]
    assert costs == sorted(costs)


def test_gate_and_up_share_their_scheme_when_tied(model):
    problem = timed(model().tie(profile("gate_eq_up")), 3.3)
    choice = solve(problem, PerLayer(solver=MxMoe())).choice.reshape(-1, 3)
    assert np.array_equal(choice[:, 0], choice[:, 1])


def test_mxmoe_says_what_is_missing(model):
    table = model()
    with pytest.raises(InputError) as error:
        solve(Problem(table, Budget.bits(3)), MxMoe())
    assert str(error.value) == (
        "mxmoe: no limit 'time' in the problem; "
        'add Limit("time", weight, inf) with the time of each choice'
    )
    alone = Problem(table, Budget.bits(3))
    assert np.array_equal(solve(alone, MxMoe(exponent=1)).choice, solve(alone).choice)
    limits: list[Limit | Budget] = [Budget.bytes(3), Limit("time", -np.ones((1, 2)), np.inf)]
    with pytest.raises(InputError, match="mxmoe: a time is -1; it must be at least 0"):
        solve(Problem(CostTable.from_arrays([[1.0, 0.0]], [[1, 2]]), limits), MxMoe())


def test_equal_budgets_give_every_layer_the_same_average(model):
    table = model()
    problem = Problem(table, Budget.bits(3.25))
    whole, split = solve(problem), solve(problem, PerLayer(solver=Knapsack()))
    assert split.solver == "knapsack per layer"
    assert split.cost > whole.cost
    assert split.gap > 0
    for layer in range(3):
        units = table.units.layer == layer
        used = 8 * split.plan.nbytes[units].sum() / table.units.numel[units].sum()
        assert 3.1 < used <= 3.25
    # The hardest layer gets more when layers compete.
    assert whole.plan.nbytes[24:].sum() > split.plan.nbytes[24:].sum()


def test_what_layers_cannot_share_is_refused(model):
    table = model()
    with pytest.raises(InputError, match="knapsack per layer: a tie joins units of different"):
        solve(
            Problem(table.tie(np.arange(36) % 12), Budget.bits(3.25)), PerLayer(solver=Knapsack())
        )
    floor = Limit("floor", -np.ones((36, 3)), -1)
    with pytest.raises(InputError, match="a negative limit cannot be shared among layers; drop it"):
        solve(Problem(table, floor), PerLayer(solver=Knapsack()))
    pinned = table.pin("layer=1", bits=4)
    with pytest.raises(InfeasibleError) as error:
        solve(Problem(pinned, Budget.bits(3.25)), PerLayer(solver=Knapsack()))
    assert str(error.value) == (
        "knapsack per layer: layer 1 has no plan within its share of the limits; "
        "raise them or solve all layers together"
    )
