"""Named laws of the solver, on tables small enough to try every plan."""

from dataclasses import replace
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitknap.allocation import (
    CostTable,
    Format,
    Limit,
    Problem,
    Solution,
    Status,
    Units,
    solve,
)
from bitknap.errors import InfeasibleError

# Six digits, so that sums are either equal or further apart than rounding.
NUMBERS = st.integers(0, 12).map(float) | st.integers(0, 10**7).map(lambda x: x / 10**6)
COSTS = NUMBERS | st.just(float(np.inf))


@st.composite
def problems(draw: st.DrawFn, limits: int = 1, signed: bool = False) -> Problem:
    """Up to 5 rows and options: not convex, with duplicates, zeros, ties, forbidden ones."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))

    def matrix(values: st.SearchStrategy[float]) -> npt.NDArray[np.float64]:
        flat = draw(st.lists(values, min_size=rows * width, max_size=rows * width))
        return np.array(flat).reshape(rows, width)

    cost = matrix(COSTS)
    cost[np.isinf(cost).all(axis=1), 0] = 1.0
    table = CostTable.from_arrays(cost, np.ones(cost.shape, dtype=int))
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


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_knapsack_equals_brute_force(problem):
    check(problem)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(problems(limits=2))
def test_two_limits_equal_brute_force(problem):
    check(problem)


@settings(max_examples=40, deadline=None)
@given(problems(limits=1, signed=True))
def test_weights_of_any_sign_equal_brute_force(problem):
    check(problem)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(problems(), st.floats(0, 10))
def test_a_looser_limit_never_costs_more(problem, extra):
    limit = problem.limits[0]
    wider = Problem(problem.table, [Limit(limit.name, limit.weight, limit.bound + extra)])
    tight, loose = solved(problem), solved(wider)
    if tight is not None:
        assert loose is not None
        assert loose.cost <= tight.cost + 1e-12 * abs(tight.cost)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(problems())
def test_tying_never_gains(problem):
    free = Problem(replace(problem.table, ties=None), problem.limits)
    tied, best = solved(problem), solved(free)
    if tied is not None:
        assert best is not None
        assert best.cost <= tied.cost + 1e-9 * max(1, abs(tied.cost))


def swept(seed: int) -> Problem:
    """Return a small problem with costs and weights from 1e-12 to 1e12, zeros and duplicates."""
    random = np.random.default_rng(seed)
    rows, width = map(int, random.integers(1, 5, 2))

    def numbers() -> npt.NDArray[np.float64]:
        kind = random.integers(5)
        if kind == 0:
            return random.integers(0, 4, (rows, width)).astype(float)
        if kind == 1:
            return 10.0 ** random.uniform(-12, 12, (rows, width))
        if kind == 2:
            return np.round(10.0 ** random.uniform(0, 12, (rows, width)))
        scale = 10.0 ** random.integers(-12, 13)
        values = scale * random.random((rows, width))
        return values if kind == 3 else scale * np.sort(values, axis=1)

    cost = numbers()
    cost[random.random((rows, width)) < random.choice([0, 0.3])] = np.inf
    cost[random.random((rows, width)) < random.choice([0, 0.3])] = 0.0
    if random.random() < 0.3:
        cost[:] = cost[0]
    cost[np.isinf(cost).all(axis=1), -1] = 1.0
    weight = numbers() if random.random() < 0.8 else np.sort(numbers(), axis=1)
    if random.random() < 0.3:
        weight[:] = weight[0]
    if random.random() < 0.3:
        # As a pin does.
        cost[0, np.arange(width) != np.isfinite(cost[0]).argmax()] = np.inf
    labels = random.integers(0, rows, rows, dtype=np.int32)
    tied = all(np.isfinite(cost[labels == x]).all(axis=0).any() for x in labels)
    table = CostTable(
        units=Units.anonymous(rows),
        formats=tuple(map(Format.made_up, range(width))),
        cost=cost,
        nbytes=np.ones(cost.shape, dtype=int),
        ties=labels if tied and random.random() < 0.3 else None,
    )
    low, high = weight.min(axis=1).sum(), weight.max(axis=1).sum()
    bound = low + random.choice([0.0, 1.0, random.uniform(-0.05, 1.05)]) * (high - low)
    return Problem(table, Limit("weight", weight, bound))


def bracketed(problem: Problem, doubt: float = 1e-11) -> tuple[float, float]:
    """Return the least cost with the limit a little looser, and a little tighter."""
    count, width = problem.cost.shape
    rows, plans = np.arange(count)[:, None], np.indices((width,) * count).reshape(count, -1)
    with np.errstate(invalid="ignore"):
        costs = problem.cost[rows, plans].sum(axis=0)
    used = problem.weights[0][rows, plans]
    over = used.sum(axis=0) - problem.bounds[0]
    margin = doubt * np.abs(used).sum(axis=0)
    loose = np.where(over <= margin, costs, np.inf).min()
    tight = np.where(over <= -margin, costs, np.inf).min()
    return float(loose), float(tight)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(6))
def test_thousands_of_tables_over_24_orders_of_magnitude_equal_brute_force(block):
    for seed in range(500 * block, 500 * (block + 1)):
        problem = swept(seed)
        loose, tight = bracketed(problem)
        found = solved(problem)
        if found is None:
            assert tight == np.inf, seed
            continue
        # Of the plan's own costs, not of larger ones that it avoids.
        paid = problem.table.cost[np.arange(len(found.choice)), found.choice]
        noise = 1e-12 * float(np.abs(paid).sum())
        assert loose - noise <= found.cost <= tight + noise, seed
        assert found.bound <= found.cost, seed
        assert found.bound <= tight + noise, seed
