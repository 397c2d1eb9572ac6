"""ExLlamaV2's annealing."""

import numpy as np
import pytest

from bitknap.allocation import (
    Budget,
    CostTable,
    Problem,
    formats,
    solve,
)
from bitknap.allocation.published import Annealing

QUICK = Annealing(iterations=20, cooling=0.8, runs=3)


LOW, MIDDLE, HIGH = formats(bits=(2, 3, 4), group_size=64)


def test_annealing_is_repeatable_and_near_the_best(model):
    problem = Problem(model(), Budget.bits(3.25))
    solver = Annealing(cooling=0.98)
    found, again = solve(problem, solver), solve(problem, solver)
    assert np.array_equal(found.choice, again.choice)
    best = solve(problem)
    assert best.cost <= found.cost < 1.1 * best.cost
    assert found.bound == pytest.approx(best.cost, rel=0.05)


def test_annealing_looks_for_a_small_largest_cost():
    # One byte to spend: on the largest cost, or on the largest saving.
    table = CostTable.from_arrays([[9.0, 8.0], [3.0, 0.0]], [[1, 2], [1, 2]])
    problem = Problem(table, Budget.bytes(3))
    assert solve(problem).choice.tolist() == [0, 1]
    found = solve(problem, Annealing(iterations=20, cooling=0.9, exponents=(3.5, 3.5)))
    assert found.choice.tolist() == [1, 0]
    # The dual at its best multiplier, 3: (9 + 3) + (0 + 6) - 9.
    assert (found.cost, found.bound) == (11.0, 9.0)


def test_annealing_leaves_no_bytes_that_help(model):
    problem = Problem(model(seed=1), Budget.bits(3.1))
    found = solve(problem, QUICK)
    left = problem.bounds[0] - found.plan.total_bytes
    used = problem.weights[0][np.arange(36), found.choice]
    cheaper = problem.cost < problem.cost[np.arange(36), found.choice][:, None]
    assert (problem.weights[0] - used[:, None])[cheaper].min() > left
