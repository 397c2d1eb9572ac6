"""What all published allocators keep to: limits, bounds and checked settings."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitknap.allocation import (
    Budget,
    CostTable,
    Format,
    Knapsack,
    Limit,
    Problem,
    Solver,
    formats,
    solve,
)
from bitknap.allocation.published import Annealing, Lagrangian, MxMoe, PerLayer, Threshold
from bitknap.errors import InfeasibleError, InputError

QUICK = Annealing(iterations=20, cooling=0.8, runs=3)


LOW, MIDDLE, HIGH = formats(bits=(2, 3, 4), group_size=64)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rows, width = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    numbers = st.integers(0, 12).map(float) | st.integers(0, 10**6).map(lambda x: x / 10**5)

    def matrix(values: st.SearchStrategy[float]) -> Any:
        flat = draw(st.lists(values, min_size=rows * width, max_size=rows * width))
        return np.array(flat).reshape(rows, width)

    cost = matrix(numbers | st.just(float(np.inf)))
    cost[np.isinf(cost).all(axis=1), 0] = 1.0
    weight = matrix(numbers)
    table = CostTable.from_arrays(cost, np.ones(cost.shape, dtype=int))
    least = np.where(np.isfinite(cost), weight, np.inf).min(axis=1).sum()
    share = draw(st.floats(0, 1, width=16))
    bound = np.ceil(least + share * (weight.max(axis=1).sum() - least))
    times = matrix(st.integers(0, 9).map(float))
    return Problem(table, [Limit("memory", weight, bound), Limit("time", times, np.inf)])


TWO = Threshold(low=Format.made_up(0), high=Format.made_up(1), per="unit")


SOLVERS: tuple[Solver, ...] = (
    Lagrangian(),
    TWO,
    QUICK,
    MxMoe(exponent=0.5),
    MxMoe(exponent=0.0),
    PerLayer(solver=Knapsack()),
)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
@settings(deadline=None, max_examples=15)
@given(problem=problems())
def test_a_published_solver_keeps_the_limits_and_is_never_better_than_the_knapsack(solver, problem):
    best = solve(problem)
    try:
        # `solve` checks the limits and that the bound is not above the cost.
        found = solve(problem, solver)
    except InfeasibleError:
        # Two formats alone may not fit.
        assert solver is TWO
        return
    scale = 1e-9 * max(1.0, best.cost)
    assert found.bound <= best.cost + scale
    assert best.cost <= found.cost + scale


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(problem=problems(), exponent=st.sampled_from([0.1, 0.5, 0.75, 0.95]))
def test_the_product_of_loss_and_time_is_the_least_of_all_plans(problem, exponent):
    count, width = problem.cost.shape
    rows = np.arange(count)

    def value(plan: Any) -> float:
        loss = problem.cost[rows, plan].sum()
        return float(loss**exponent * problem.weights[1][rows, plan].sum() ** (1 - exponent))

    tried = [
        value(plan)
        for plan in product(range(width), repeat=count)
        if problem.weights[0][rows, plan].sum() <= problem.bounds[0]
        and np.isfinite(problem.cost[rows, plan]).all()
    ]
    found = solve(problem, MxMoe(exponent=exponent))
    assert value(found.choice) == pytest.approx(min(tried), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("solver", [Lagrangian(), TWO, QUICK], ids=lambda solver: solver.name)
def test_one_finite_limit_is_needed(solver):
    table = CostTable.from_arrays([[1.0, 0.0]], [[1, 2]])
    with pytest.raises(InputError) as error:
        solve(Problem(table, []), solver)
    assert str(error.value) == (
        f"{solver.name}: takes one finite limit, the problem has 0; add one"
    )
    two: list[Limit | Budget] = [Budget.bytes(2), Limit("reads", table.nbytes, 2)]
    with pytest.raises(InputError) as error:
        solve(Problem(table, two), solver)
    assert str(error.value) == (
        f"{solver.name}: takes one finite limit, the problem has 2; drop some or use Knapsack()"
    )


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (Lagrangian, {"multiplier": -1}),
        (Lagrangian, {"rounds": 0}),
        (MxMoe, {"exponent": 1.5}),
        (Annealing, {"iterations": 0}),
        (Annealing, {"runs": 0}),
        (Annealing, {"cooling": 1}),
        (Annealing, {"cold": 3}),
        (Annealing, {"exponents": (3, 2)}),
        (Threshold, {"per": "bit", "low": LOW, "high": HIGH}),
    ],
)
def test_settings_are_checked(make, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        make(**wrong)
    with pytest.raises(InputError, match="threshold: low and high are both int2-g64-asym"):
        Threshold(low=LOW, high=LOW)
