"""Evolution by level switches: within limits, better with more plans, the same by seed."""

import numpy as np
import pytest

from bitknap.allocation import Budget, CostTable, Problem, Status, formats, solve
from bitknap.allocation.published.evopress import Evolution
from bitknap.errors import InfeasibleError, InputError
from bitknap.testing import routed_units


@pytest.fixture
def problem():
    draw = np.random.default_rng(0)
    units = routed_units(4, 4, ("down",))
    widths = formats((2, 3, 4, 8), 8)
    cost = draw.lognormal(0, 2, size=(16, 1)) * np.array([4.0**-item.bits for item in widths])
    return Problem(CostTable.from_arrays(cost, units=units, formats=widths), [Budget.bits(7)])


def measures(problem):
    each = np.arange(len(problem.table.units))

    def measure(choice):
        return np.full(4, problem.table.cost[each, choice].sum())

    return (measure, measure)


def test_more_plans_lose_less_and_none_beats_the_knapsack(problem):
    least = solve(problem).cost
    costs = []
    for count in (1, 40, 600):
        found = solve(problem, Evolution(parts=measures(problem), evaluations=count))
        assert found.status is Status.FEASIBLE
        costs.append(found.cost)
    assert costs[0] >= costs[1] >= costs[2] >= least * (1 - 1e-12)
    assert costs[2] < costs[0]


def test_one_seed_one_plan(problem):
    settings = Evolution(parts=measures(problem), evaluations=60, seed=4)
    one, two = (solve(problem, settings) for _ in range(2))
    assert one.choice.tolist() == two.choice.tolist()


def test_it_begins_at_the_given_plan(problem):
    start = tuple(solve(problem).choice.tolist())
    found = solve(problem, Evolution(parts=measures(problem), evaluations=1, start=start))
    assert tuple(found.choice.tolist()) == start


def test_bad_input(problem):
    with pytest.raises(InputError, match="parts: the list is empty"):
        Evolution(parts=())
    with pytest.raises(InputError, match="evaluations: 0"):
        Evolution(parts=measures(problem), evaluations=0)
    small = Problem(problem.table, [Budget.bits(1)])
    with pytest.raises(InfeasibleError):
        solve(small, Evolution(parts=measures(problem)))
