"""FRI-MxMoE's multiplier: on the hull, and steered by bisection."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitknap.allocation import (
    Budget,
    CostTable,
    Limit,
    Problem,
    Status,
    solve,
)
from bitknap.allocation.published import Lagrangian
from bitknap.allocation.solvers.lower_hulls import options
from bitknap.errors import BitknapError


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1, width=16))
def test_the_lagrangian_never_leaves_the_hull(seed, share):
    generator = np.random.default_rng(seed)
    cost, weight = generator.random((6, 5)), generator.random((6, 5))
    table = CostTable.from_arrays(cost, np.ones((6, 5), dtype=int))
    low, high = weight.min(axis=1).sum(), weight.max(axis=1).sum()
    limit = Limit("memory", weight, low + share * (high - low))
    found = solve(Problem(table, limit), Lagrangian())
    ordered = options(cost, weight)
    position = (ordered.option == found.choice).argmax(axis=0)
    assert ordered.hull[position, np.arange(6)].all()


def test_the_lagrangian_skips_what_the_knapsack_takes():
    # From 10 to 0, the middle option is above the chord: never the argmin of a priced row.
    table = CostTable.from_arrays([[10.0, 6.0, 0.0]], [[1, 6, 11]])
    problem = Problem(table, Budget.bytes(10))
    assert solve(problem).choice.tolist() == [1]
    found = solve(problem, Lagrangian())
    assert found.choice.tolist() == [0]
    # The dual at its best multiplier, 1: 10 - 9.
    assert found.bound == pytest.approx(1.0)
    assert found.status is Status.FEASIBLE


def test_equal_rows_move_together_and_nothing_fills_the_rest():
    table = CostTable.from_arrays(np.tile([1.0, 0.0], (10, 1)), np.tile([1, 2], (10, 1)))
    assert solve(Problem(table, Budget.bytes(19)), Lagrangian()).cost == 10
    found = solve(Problem(table, Budget.bytes(20)), Lagrangian())
    assert (found.cost, found.status) == (0, Status.OPTIMAL)


def test_a_given_multiplier_steers_towards_no_limit():
    table = CostTable.from_arrays([[9.0, 4.0, 1.0], [5.0, 3.0, 2.0]], [[1, 2, 4], [1, 2, 4]])
    # 9+1, 4+2, 1+4 and 5+1, 3+2, 2+4.
    found = solve(Problem(table, Budget.bytes(8)), Lagrangian(multiplier=1))
    assert found.choice.tolist() == [2, 1]
    # The dual: 5 + 5 - 8.
    assert found.bound == 2.0
    with pytest.raises(BitknapError, match="lagrangian: broke the limit memory: 6 of 4"):
        solve(Problem(table, Budget.bytes(4)), Lagrangian(multiplier=1))
    free = Problem(table, Limit("memory", table.nbytes, np.inf))
    assert solve(free, Lagrangian(multiplier=1)).choice.tolist() == [2, 1]
