import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitknap.allocation import Budget, CostTable, Ilp, Knapsack, Limit, Problem, Status, solve
from bitknap.errors import InfeasibleError, InputError

BACKENDS = ("highs", "cbc")


def drawn(seed: int, rows: int = 40, limits: int = 1) -> Problem:
    """A random problem whose limits bind."""
    generator = np.random.default_rng(seed)
    cost = generator.exponential(size=(rows, 5)) * np.exp(-np.arange(5))
    cost[generator.random(cost.shape) < 0.05] = np.inf
    cost[:, 0] = generator.exponential(size=rows) * 3
    table = CostTable.from_arrays(cost, np.cumsum(generator.integers(1, 9, cost.shape), axis=1))
    found: list[Limit | Budget] = [Budget.bytes(int(table.nbytes[:, 2].sum()))]
    for number in range(1, limits):
        weight = generator.random(cost.shape) * np.arange(5)
        found.append(Limit(f"limit {number}", weight, 0.9 * float(weight[:, 2].sum())))
    return Problem(table, found)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limits", [1, 3])
def test_it_agrees_with_the_knapsack(backend, limits):
    for seed in range(3):
        problem = drawn(seed, limits=limits)
        ours, other = solve(problem), solve(problem, Ilp(backend=backend))
        assert other.cost == pytest.approx(ours.cost, rel=1e-9)
        assert other.status is Status.OPTIMAL
        assert other.solver == f"ilp-{backend}"


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(BACKENDS))
def test_its_bound_holds_and_its_plan_is_within_the_limits(seed, backend):
    problem = drawn(seed, rows=6, limits=2)
    try:
        best = solve(problem, Knapsack())
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            solve(problem, Ilp(backend=backend))
        return
    found = solve(problem, Ilp(backend=backend))
    assert found.bound <= best.cost * (1 + 1e-9)
    assert found.cost == pytest.approx(best.cost, rel=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infeasible_limits_are_said_so(backend):
    table = CostTable.from_arrays([[3.0, 1.0], [3.0, 1.0]], [[1, 2], [1, 2]])
    one = Limit("wide", np.array([[1.0, 0.0]]), 0.5)
    with pytest.raises(InfeasibleError) as error:
        solve(Problem(table, [Budget.bytes(3), one]), Ilp(backend=backend))
    assert str(error.value) == (
        "limits memory and wide clash: each can be met, but not together; "
        "raise memory from 3 B to 4 B (4 bytes), or raise wide from 0.5 to 1, or add formats"
    )


def test_without_limits_every_unit_takes_its_cheapest():
    table = CostTable.from_arrays([[3.0, 1.0]], [[1, 2]])
    assert solve(Problem(table, []), Ilp()).choice.tolist() == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"backend": "gurobi"},
            "backend 'gurobi' is unknown; one of auto, highs, cbc; did you mean auto?",
        ),
        ({"gap": 1.0}, "gap: 1.0 is not a share of at least 0 and below 1"),
        ({"time_limit": 0.0}, "time_limit: 0.0 must be above 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError) as error:
        Ilp(**settings)
    assert str(error.value) == message
