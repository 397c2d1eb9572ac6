"""The greedy solver: named laws on small tables, and limits of several kinds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitknap.allocation import Answer, Budget, CostTable, Limit, Problem, Status, solve
from bitknap.allocation.solvers.greedy import Greedy
from bitknap.errors import BitknapError, InfeasibleError, InputError

NUMBERS = st.integers(0, 12).map(float) | st.integers(0, 10**6).map(lambda x: x / 10**5)
COSTS = NUMBERS | st.just(float(np.inf))


@st.composite
def problems(draw: st.DrawFn, limits: int = 1) -> Problem:
    """Up to 6 rows and options; the first limit from 0, others of any sign."""
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 5))

    def matrix(values):
        flat = draw(st.lists(values, min_size=rows * width, max_size=rows * width))
        return np.array(flat).reshape(rows, width)

    cost = matrix(COSTS)
    cost[np.isinf(cost).all(axis=1), 0] = 1.0
    found = []
    for number in range(limits):
        weight = matrix(NUMBERS if not number else NUMBERS | st.integers(-4, 0).map(float))
        low, high = weight.min(axis=1).sum(), weight.max(axis=1).sum()
        bound = low + draw(st.floats(0, 1.25, width=16)) * (high - low)
        found.append(Limit(f"limit {number}", weight, np.round(bound, 1)))
    return Problem(CostTable.from_arrays(cost, np.ones(cost.shape, dtype=int)), found)


def wider(problem: Problem, extra: float) -> Problem:
    first = problem.limits[0]
    return Problem(
        problem.table, [Limit(first.name, first.weight, first.bound + extra), *problem.limits[1:]]
    )


def tried(problem, solver=None):
    """Return the checked solution, None where none was found."""
    try:
        return solve(problem, solver)
    except BitknapError:
        return None


# Laws


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(problems() | problems(limits=3))
def test_greedy_is_within_limits_and_never_better_than_the_knapsack(problem):
    # `solve` checks the limits, and that the bound is not above the cost.
    found, best = tried(problem, Greedy()), tried(problem)
    if found is None:
        return
    assert best is not None
    assert best.cost <= found.cost + 1e-9 * max(1, abs(best.cost))
    assert found.bound <= best.cost + 1e-9 * max(1, abs(best.cost))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(problems())
def test_with_one_limit_greedy_finds_a_plan_wherever_there_is_one(problem):
    try:
        solve(problem)
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            solve(problem, Greedy())
        return
    assert solve(problem, Greedy()).gap >= 0


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(problems() | problems(limits=3), st.floats(0, 20, width=16))
def test_a_larger_budget_only_upgrades(problem, extra):
    small, large = Greedy().answer(problem).choice, Greedy().answer(wider(problem, extra)).choice
    if small is None:
        return
    assert large is not None
    rows = np.arange(len(small))
    moved = small != large
    weight = problem.weights[0]
    assert (weight[rows, large] > weight[rows, small])[moved].all()
    assert (problem.cost[rows, large] < problem.cost[rows, small])[moved].all()


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(problems(limits=2))
def test_greedy_is_deterministic(problem):
    first, second = Greedy().answer(problem), Greedy().answer(problem)
    assert str(first.choice) == str(second.choice)
    assert first.bound == second.bound


# Cases


def test_the_first_step_that_does_not_fit_ends_the_plan():
    cost, nbytes = [[9.0, 1.0], [5.0, 0.0], [1.0, 0.0]], [[1, 2], [1, 4], [1, 2]]
    # Steps save 8, 5/3 and 1 a byte: the second does not fit, the third would.
    found = solve(Problem(CostTable.from_arrays(cost, nbytes), Budget.bytes(5)), Greedy())
    assert found.choice.tolist() == [1, 0, 0]
    assert found.cost == 7
    assert found.bound == pytest.approx(7 - 5 / 3)
    assert found.status is Status.FEASIBLE
    assert found.solver == "greedy"


def test_a_budget_met_exactly_is_a_proof():
    cost, nbytes = [[9.0, 1.0], [5.0, 0.0]], [[1, 2], [1, 4]]
    found = solve(Problem(CostTable.from_arrays(cost, nbytes), Budget.bytes(3)), Greedy())
    assert (found.cost, found.gap) == (6.0, 0.0)
    assert found.status is Status.OPTIMAL


def test_ties_and_pins_are_kept():
    table = CostTable.from_arrays([[9.0, 4.0, 1.0]] * 4, [[1, 2, 4]] * 4).tie([0, 0, 1, 1])
    pinned = table.pin("expert=3", format="option-0")
    found = solve(Problem(pinned, Budget.bytes(12)), Greedy())
    assert found.choice.tolist() == [2, 2, 0, 0]


def test_without_a_bound_everything_is_cheapest():
    table = CostTable.from_arrays([[9.0, 4.0], [1.0, 3.0]], [[1, 2], [1, 2]])
    limit = Limit("none", table.nbytes, np.inf)
    for limits in ([], [limit]):
        found = solve(Problem(table, limits), Greedy())
        assert found.choice.tolist() == [1, 0]
        assert found.status is Status.OPTIMAL


def test_a_share_of_narrow_weights_is_repaired_before_the_budget():
    generator = np.random.default_rng(0)
    cost = generator.lognormal(0, 1, (200, 1)) * [1.0, 0.3, 0.1, 0.01]
    table = CostTable.from_arrays(cost, np.tile([1, 2, 3, 8], (200, 1)))
    narrow = Limit("narrow", np.array([[1.0, 1.0, 0.0, 0.0]]), 60.0)
    plans = []
    for size in (480, 500, 700):
        problem = Problem(table, [Budget.bytes(size), narrow])
        found, best = solve(problem, Greedy()), solve(problem)
        assert (found.choice < 2).sum() <= 60
        assert found.bound <= best.cost <= found.cost <= 1.02 * best.cost
        plans.append(found.choice)
    assert (plans[0] <= plans[1]).all()
    assert (plans[1] <= plans[2]).all()


def test_a_row_that_would_break_another_limit_is_over():
    cost = [[9.0, 5.0, 0.0], [3.0, 2.0, 1.0]]
    table = CostTable.from_arrays(cost, [[1, 2, 3]] * 2)
    heat = Limit("heat", np.array([[0.0, 9.0, 0.0], [0.0, 1.0, 2.0]]), 2.0)
    found = Greedy().answer(Problem(table, [Budget.bytes(6), heat]))
    # From 9 straight to 0 is the only hull step of the first row.
    assert found.choice is not None
    assert found.choice.tolist() == [2, 2]
    hot = Limit("heat", np.array([[0.0, 9.0, 9.0], [0.0, 1.0, 2.0]]), 2.0)
    found = Greedy().answer(Problem(table, [Budget.bytes(6), hot]))
    assert found.choice is not None
    assert found.choice.tolist() == [0, 2]


def test_nothing_found_is_no_proof():
    # Only the option off the hull is within the other limit.
    table = CostTable.from_arrays([[10.0, 6.0, 0.0]], [[1, 6, 11]])
    problem = Problem(table, [Budget.bytes(10), Limit("odd", np.array([[1.0, 0.0, 1.0]]), 0.0)])
    answer = Greedy().answer(problem)
    assert answer.choice is None
    assert answer.status is Status.FEASIBLE
    with pytest.raises(BitknapError, match="greedy: found no plan"):
        solve(problem, Greedy())
    assert solve(problem).choice.tolist() == [1]


def test_a_budget_with_weights_of_any_sign():
    table = CostTable.from_arrays([[9.0, 4.0, 1.0]] * 2, np.ones((2, 3), dtype=int))
    limit = Limit("any", np.array([[-3.0, -2.0, 0.0]]), -2.0)
    found = solve(Problem(table, limit), Greedy())
    assert found.choice.tolist() == [2, 1] or found.cost == 5.0


def test_a_tight_bound_of_weights_without_whole_numbers():
    weight = np.full((10, 2), [0.1, 0.3])
    table = CostTable.from_arrays(np.tile([1.0, 0.0], (10, 1)), np.ones((10, 2), dtype=int))
    assert solve(Problem(table, Limit("a", weight, 1.0)), Greedy()).cost == 10
    assert solve(Problem(table, Limit("a", weight, 1.2)), Greedy()).cost == 9


def test_slopes_beyond_floats_are_refused():
    table = CostTable.from_arrays([[1e300, 0.0], [1.0, 0.0]], np.ones((2, 2), dtype=int))
    limit = Limit("tiny", np.array([[0.0, 1e-300], [0.0, 1.0]]), 1.0)
    with pytest.raises(InputError, match="beyond floats"):
        solve(Problem(table, limit), Greedy())


def test_a_large_model_is_within_a_step_of_its_bound():
    generator = np.random.default_rng(0)
    bits = np.array([1, 2, 3, 4, 5, 6, 8, 16])
    cost = generator.lognormal(0, 1.5, (36_000, 1)) * 4.0**-bits
    table = CostTable.from_arrays(cost, np.tile(bits * 10**6, (36_000, 1)))
    answer: Answer = Greedy().answer(Problem(table, Budget.bytes(36_000 * 3 * 10**6 + 1)))
    assert answer.choice is not None
    value = cost[np.arange(36_000), answer.choice].sum()
    assert answer.bound <= value <= answer.bound * (1 + 1e-4)
