"""Several limits: the dual, the core, and why there is no plan."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog

from bitknap.allocation import Answer, Budget, CostTable, Knapsack, Limit, Problem, Status, solve
from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.solvers.highs import run as highs
from bitknap.allocation.solvers.infeasibility import clashing
from bitknap.allocation.solvers.integer_program import Program, Result, Runner
from bitknap.allocation.solvers.lagrangian_dual import evaluate, maximise
from bitknap.allocation.solvers.lower_hulls import fitting
from bitknap.allocation.solvers.many_limits import answer
from bitknap.errors import InfeasibleError


def drawn(seed: int, rows: int, limits: int) -> tuple[Floats, Floats, Floats]:
    generator = np.random.default_rng(seed)
    cost = np.exp(generator.normal(size=(rows, 1))) * np.exp(-1.2 * np.arange(6))
    weights = generator.random((limits, rows, 1)) * np.arange(6)
    return cost, weights, 0.4 * weights.max(axis=2).sum(axis=1)


def relaxed(cost: Floats, weights: Floats, bounds: Floats) -> float:
    """The linear relaxation, whole."""
    rows, width = cost.shape
    result = linprog(
        cost.ravel(),
        A_ub=weights.reshape(len(bounds), -1),
        b_ub=bounds,
        A_eq=np.kron(np.eye(rows), np.ones(width)),
        b_eq=np.ones(rows),
        method="highs",
    )
    return float(result.fun)


@pytest.mark.parametrize("limits", [1, 2, 5])
def test_the_dual_is_the_linear_relaxation(limits):
    cost, weights, bounds = drawn(0, 200, limits)
    assert maximise(cost, weights, bounds).value == pytest.approx(
        relaxed(cost, weights, bounds), rel=1e-8
    )


@pytest.mark.slow
def test_the_dual_of_many_rows_starts_from_a_sample():
    cost, weights, bounds = drawn(1, 4000, 3)
    point = maximise(cost, weights, bounds)
    # Strong duality: no multipliers nearby are better, and the value is what they say.
    assert point.value == evaluate(cost, weights, bounds, point.multipliers).value
    for change in (0.99, 1.01):
        assert evaluate(cost, weights, bounds, change * point.multipliers).value <= point.value


def test_options_that_never_fit_are_kept_out_of_the_arithmetic():
    cost = np.array([[5.0, 1.0, -1e15], [2.0, 1.0, 0.0]])
    weight = np.array([[1.0, 2.0, 9.0], [1.0, 2.0, 3.0]])
    assert np.isinf(fitting(cost, weight, 4.0)).tolist() == [[False, False, True], [False] * 3]


@pytest.mark.parametrize(
    ("cost", "weight", "bound", "choice"),
    [
        # An option out of reach that is 1e16 times cheaper than all others.
        ([[1.7e11, 1.69e11, 1.68e11, 0.0]], [[0.0, 1.0, 3.0, 3.0]], 1.36, [1]),
        # A slope beyond floats.
        ([[1e300, 0.0], [1.0, 0.0]], [[0.0, 1e-300], [0.0, 1.0]], 0.0, [0, 0]),
    ],
)
def test_numbers_of_all_sizes(cost, weight, bound, choice):
    table = CostTable.from_arrays(cost, np.ones(np.shape(cost), dtype=int))
    found = solve(Problem(table, Limit("one", np.array(weight), bound)))
    assert found.choice.tolist() == choice
    assert found.status is Status.OPTIMAL


def test_costs_of_all_sizes_under_two_limits():
    # The dear options are 1e15 times what the plan costs: the second core leaves them out.
    cost = [[0, 1.0876288316394081e-07, 533691779.3550314], [0, 1.5981947230462758e-09, 0]]
    first = [[2390, 96910459, 4], [3310, 558841745, 33850208616]]
    second = [
        [7.196849639626945e-10, 1.1833712274916031e-11, 6.894975350605909e-10],
        [7.754289234164831e-10, 3.0076854111928765e-10, 8.245864316493496e-10],
    ]
    table = CostTable.from_arrays(cost, np.ones((2, 3), dtype=int))
    limits = [
        Limit("first", np.array(first, dtype=float), 21364538901.496807),
        Limit("second", np.array(second), 1.0131146439198888e-09),
    ]
    found = solve(Problem(table, limits))
    assert found.choice.tolist() == [1, 0]
    assert found.gap < 1e-9


@pytest.mark.slow
def test_an_early_stop_keeps_a_valid_bound():
    cost, weights, bounds = drawn(2, 3000, 4)
    table = CostTable.from_arrays(cost, np.ones(cost.shape, dtype=int))
    limits = [
        Limit(f"limit {i}", w, b) for i, (w, b) in enumerate(zip(weights, bounds, strict=True))
    ]
    rough = solve(Problem(table, limits), Knapsack(gap=0.01))
    assert rough.gap <= 0.01
    assert rough.bound <= rough.cost


def limited(cost: Floats, weights: Floats, bounds: Floats, run: Runner, **more: Any) -> Answer:
    return answer(cost, weights, bounds, run, gap=0.0, time_limit=60.0, **more)


@pytest.mark.slow
def test_a_core_without_an_answer_proves_nothing():
    cost, weights, bounds = drawn(3, 3000, 3)
    dual = maximise(cost, weights, bounds).value
    calls = []

    def gives_up(program: Program, gap: float, seconds: float) -> Result:
        calls.append(len(program.cost))
        if len(calls) > 1:
            return Result(picked=None, bound=-np.inf, finished=False)
        # A plan far from the best, so that a larger core is asked for.
        return replace(highs(program, 1e5, seconds), bound=-np.inf, finished=True)

    found = limited(cost, weights, bounds, gives_up)
    assert len(calls) == 2
    assert found.choice is not None
    assert found.bound == dual
    assert found.status is Status.FEASIBLE


def test_a_known_plan_is_never_lost():
    cost, weights, bounds = drawn(4, 100, 2)
    start = np.zeros(len(cost), dtype=np.int64)  # weighs nothing

    def gives_up(program: Program, gap: float, seconds: float) -> Result:
        return Result(picked=None, bound=-np.inf, finished=False)

    found = limited(cost, weights, bounds, gives_up, start=start)
    assert found.choice is not None and np.array_equal(found.choice, start)
    assert found.bound == pytest.approx(maximise(cost, weights, bounds).value)
    assert found.status is Status.FEASIBLE


def test_limits_that_were_tightened_for_rounding_prove_nothing():
    cost, weights, bounds = drawn(5, 30, 2)
    calls = []

    def just_above(program: Program, gap: float, seconds: float) -> Result:
        calls.append(program.bounds)
        if len(calls) % 2:  # each core's first try, before its limits are tightened
            first = np.unique(program.row, return_index=True)[1]
            last = np.append(first[1:], len(program.row)) - 1
            picked = np.zeros(len(program.row), dtype=np.bool_)
            picked[last] = True
            return Result(picked=picked, bound=0.0, finished=True)
        return Result(picked=None, bound=-np.inf, finished=True)

    found = limited(cost, weights, bounds, just_above)
    assert found.status is not Status.INFEASIBLE


def clash() -> Problem:
    """At most 10 bytes for units that take 2 or 4, one of three wide, and no rank of its own."""
    table = CostTable.from_arrays(np.ones((4, 2)), np.tile([2, 4], (4, 1)))
    narrow = np.array([[1.0, 0.0]])
    return Problem(
        table,
        [Budget.bytes(10), Limit("narrow", narrow, 2), Limit("rank", table.nbytes, 1000.0)],
    )


def test_the_first_limits_are_blamed_and_the_ways_out_are_enough():
    problem = clash()
    assert clashing(problem) == [0, 1]
    with pytest.raises(InfeasibleError) as error:
        solve(problem)
    assert str(error.value) == (
        "limits memory and narrow clash: each can be met, but not together; "
        "raise memory from 10 B to 12 B (12 bytes), or raise narrow from 2 to 3, or add formats"
    )
    wider: list[Limit | Budget] = [Budget.bytes(12), *problem.limits[1:]]
    assert solve(Problem(problem.table, wider)).used == {"memory": 12, "narrow": 2, "rank": 12}
    looser = [problem.limits[0], Limit("narrow", problem.limits[1].weight, 3)]
    assert solve(Problem(problem.table, looser)).used == {"memory": 10, "narrow": 3}


def test_a_floor_is_lowered_not_raised():
    table = CostTable.from_arrays(np.ones((4, 2)), np.tile([2, 4], (4, 1)))
    wide = Limit("wide", np.array([[0.0, -1.0]]), -3)
    with pytest.raises(InfeasibleError, match=r"or lower wide from 3 to 1, or add formats"):
        solve(Problem(table, [Budget.bytes(10), wide]))
    with pytest.raises(InfeasibleError) as error:
        solve(Problem(table, Limit("wide", np.array([[0.0, -1.0]]), -5)))
    assert str(error.value) == (
        "wide: the most any plan reaches is 4, the limit asks for 5; lower the limit or add formats"
    )
