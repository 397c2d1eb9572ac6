"""Named laws of the solver, on tables small enough to try every plan."""

from dataclasses import replace
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitknap.allocation import CostTable, Limit, Problem, Solution, Status, solve
from bitknap.errors import InfeasibleError

# Six digits, so that sums are either equal or further apart than rounding.
NUMBERS = st.integers(0, 12).map(float) | st.integers(0, 10**7).map(lambda x: x / 10**6)
COSTS = NUMBERS | st.integers(-5, 0).map(float) | st.just(float(np.inf))


@st.composite
def problems(draw: st.DrawFn, limits: int = 1, signed: bool = False) -> Problem:
    """Up to 5 rows and options: not convex, with duplicates, zeros, ties, forbidden ones."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))

    def matrix(values: st.SearchStrategy[float]) -> npt.NDArray[np.float64]:
        flat = draw(st.lists(values, min_size=rows * width, max_size=rows * width))
        return np.array(flat).reshape(rows, width)

    cost = matrix(COSTS)
    cost[np.isinf(cost).all(axis=1), 0] = 1.0
    table = CostTable.from_arrays(cost, np.zeros(cost.shape, dtype=int))
    if draw(st.booleans()):
        labels = draw(st.lists(st.integers(0, rows), min_size=rows, max_size=rows))
        if all(np.isfinite(cost[np.array(labels) == x]).all(axis=0).any() for x in set(labels)):
            table = table.tie(labels)
    found = []
    for number in range(limits):
        weight = matrix(NUMBERS | st.integers(-4, 0).map(float) if signed else NUMBERS)
        share = draw(st.floats(0, 1.25, width=16))
        low, high = weight.min(axis=1).sum(), weight.max(axis=1).sum()
        found.append(Limit(f"limit {number}", weight, np.round(low + share * (high - low), 1)))
    return Problem(table, found)


def tried(problem: Problem) -> float:
    """Return the least cost over all plans; inf when none is within the limits."""
    count, width = problem.cost.shape
    rows, best = np.arange(count), np.inf
    for plan in product(range(width), repeat=count):
        used = problem.weights[:, rows, plan]
        if (used.sum(axis=1) <= problem.bounds + 1e-12 * np.abs(used).sum(axis=1)).all():
            best = min(best, float(problem.cost[rows, plan].sum()))
    return best


def solved(problem: Problem) -> Solution | None:
    try:
        return solve(problem)
    except InfeasibleError:
        return None


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-9, abs=1e-9)


def check(problem: Problem) -> None:
    best, found = tried(problem), solved(problem)
    if found is None:
        assert best == np.inf
        return
    assert found.cost == close(best)
    assert found.bound <= best + 1e-9 * max(1, abs(best))
    assert found.status is Status.OPTIMAL
    assert found.bound <= found.cost


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_knapsack_equals_brute_force(problem):
    check(problem)


@settings(max_examples=60, deadline=None)
@given(problems(limits=2))
def test_two_limits_equal_brute_force(problem):
    check(problem)


@settings(max_examples=40, deadline=None)
@given(problems(limits=1, signed=True))
def test_weights_of_any_sign_equal_brute_force(problem):
    check(problem)


@settings(max_examples=100, deadline=None)
@given(problems(), st.floats(0, 10))
def test_a_looser_limit_never_costs_more(problem, extra):
    limit = problem.limits[0]
    wider = Problem(problem.table, [Limit(limit.name, limit.weight, limit.bound + extra)])
    tight, loose = solved(problem), solved(wider)
    if tight is not None:
        assert loose is not None
        assert loose.cost <= tight.cost + 1e-12 * abs(tight.cost)


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(-40, 40))
def test_scaling_costs_scales_the_cost_of_the_plan(problem, power):
    scaled = replace(problem.table, cost=problem.table.cost * 2.0**power)
    first, second = solved(problem), solved(Problem(scaled, problem.limits))
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        # Powers of two scale every rounding as well.
        assert second.choice.tolist() == first.choice.tolist()
        assert second.cost == first.cost * 2.0**power


@settings(max_examples=100, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_permuting_units_permutes_the_plan(problem, random):
    order = list(range(len(problem.table.units)))
    random.shuffle(order)
    table, limit = problem.table, problem.limits[0]
    shuffled = CostTable.from_arrays(table.cost[order], table.nbytes[order])
    if table.ties is not None:
        shuffled = shuffled.tie(table.ties[order])
    weight = np.broadcast_to(limit.weight, table.cost.shape)[order]
    other = solved(Problem(shuffled, [Limit(limit.name, weight, limit.bound)]))
    found = solved(problem)
    assert (found is None) == (other is None)
    if found is not None and other is not None:
        # Up to plans of equal cost, of which there may be several.
        assert other.cost == close(found.cost)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_tying_never_gains(problem):
    free = Problem(replace(problem.table, ties=None), problem.limits)
    tied, best = solved(problem), solved(free)
    if tied is not None:
        assert best is not None
        assert best.cost <= tied.cost + 1e-9 * max(1, abs(tied.cost))
