import math
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
    Status,
    Units,
    formats,
    profile,
    solve,
)
from bitknap.allocation.published import Annealing, Lagrangian, MxMoe, PerLayer, Threshold
from bitknap.allocation.solvers.lower_hulls import options
from bitknap.errors import BitknapError, InfeasibleError, InputError

QUICK = Annealing(iterations=20, cooling=0.8, runs=3)
LOW, MIDDLE, HIGH = formats(bits=(2, 3, 4), group_size=64)


def model(layers: int = 3, experts: int = 4, seed: int = 0) -> CostTable:
    """Errors that fall with bits, two shapes, an easy and a hard layer."""
    keys = [
        (layer, expert, name)
        for layer in range(layers)
        for expert in range(experts)
        for name in ("gate", "up", "down")
    ]
    units = Units.build(
        layer=[x[0] for x in keys],
        role=["routed"] * len(keys),
        expert=[x[1] for x in keys],
        projection=[x[2] for x in keys],
        rows=[128 if x[2] == "down" else 64 for x in keys],
        cols=[64 if x[2] == "down" else 128 for x in keys],
    )
    generator = np.random.default_rng(seed)
    scale = generator.lognormal(0, 1, (len(keys), 1)) * 4.0 ** (units.layer[:, None])
    cost = scale * 4.0 ** -np.array([2, 3, 4]) * generator.lognormal(0, 0.2, (len(keys), 3))
    return CostTable.from_arrays(cost, units=units, formats=(LOW, MIDDLE, HIGH))


def timed(table: CostTable, bits: float, seed: int = 0) -> Problem:
    """A memory limit, and times that rise and fall with bits."""
    generator = np.random.default_rng(seed)
    times = generator.integers(1, 30, table.cost.shape).astype(float)
    return Problem(table, [Budget.bits(bits), Limit("time", times, math.inf)])


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


def test_the_ends_of_the_exponent_are_loss_alone_and_time_alone():
    problem = timed(model(), 3.5)
    assert np.array_equal(solve(problem, MxMoe(exponent=1)).choice, solve(problem).choice)
    times = problem.weights[1]
    fastest = solve(problem, MxMoe(exponent=0))
    swapped = CostTable.from_arrays(times, problem.table.nbytes)
    limit = Limit("memory", problem.weights[0], problem.bounds[0])
    assert times[np.arange(36), fastest.choice].sum() == solve(Problem(swapped, limit)).cost


def test_more_weight_on_the_time_takes_less_time():
    problem = timed(model(), 3.5)
    plans = [solve(problem, MxMoe(exponent=r)) for r in (1, 0.9, 0.75, 0.5, 0.25, 0)]
    times = [float(problem.weights[1][np.arange(36), plan.choice].sum()) for plan in plans]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]
    costs = [plan.cost for plan in plans]
    assert costs == sorted(costs)


def test_gate_and_up_share_their_scheme_when_tied():
    problem = timed(model().tie(profile("gate_eq_up")), 3.3)
    choice = solve(problem, PerLayer(solver=MxMoe())).choice.reshape(-1, 3)
    assert np.array_equal(choice[:, 0], choice[:, 1])


def test_mxmoe_says_what_is_missing():
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
    with pytest.raises(InputError, match="mxmoe: a time is -1; it must be from 0"):
        solve(Problem(CostTable.from_arrays([[1.0, 0.0]], [[1, 2]]), limits), MxMoe())


def test_equal_budgets_give_every_layer_the_same_average():
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


def test_what_layers_cannot_share_is_refused():
    table = model()
    with pytest.raises(InputError, match="knapsack per layer: a tie joins units of different"):
        solve(
            Problem(table.tie(np.arange(36) % 12), Budget.bits(3.25)), PerLayer(solver=Knapsack())
        )
    floor = Limit("floor", -np.ones((36, 3)), -1)
    with pytest.raises(InputError, match="a negative limit has no shares; drop it"):
        solve(Problem(table, floor), PerLayer(solver=Knapsack()))
    pinned = table.pin("layer=1", bits=4)
    with pytest.raises(InfeasibleError) as error:
        solve(Problem(pinned, Budget.bits(3.25)), PerLayer(solver=Knapsack()))
    assert str(error.value) == (
        "knapsack per layer: layer 1 has no plan within its share of the limits; "
        "raise them or solve all layers together"
    )


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


def test_the_threshold_gives_the_better_format_to_the_most_sensitive():
    units = model(1, 1).units
    cost = [[9.0, 5.0, 0.0], [7.0, 3.0, 0.0], [8.0, 6.0, 0.0]]
    table = CostTable.from_arrays(cost, units=units, formats=(LOW, MIDDLE, HIGH))
    step = int(table.nbytes[0, 2] - table.nbytes[0, 0])
    least = int(table.nbytes[:, 0].sum())
    plans = [
        solve(
            Problem(table, Budget.bytes(least + count * step)), Threshold(low=LOW, high=HIGH)
        ).choice.tolist()
        for count in range(4)
    ]
    assert plans == [[0, 0, 0], [2, 0, 0], [2, 0, 2], [2, 2, 2]]


def test_no_threshold_separates_equal_rows():
    table = CostTable.from_arrays(np.tile([1.0, 0.0], (4, 1)), np.tile([1, 2], (4, 1)))
    assert solve(Problem(table, Budget.bytes(7)), TWO).choice.tolist() == [0] * 4
    assert solve(Problem(table, Budget.bytes(8)), TWO).choice.tolist() == [1] * 4


def test_the_threshold_counts_weights_bytes_or_nothing():
    table = CostTable.from_arrays([[8.0, 0.0], [5.0, 0.0]], [[1, 5], [1, 2]])
    problem = Problem(table, Budget.bytes(6))
    assert solve(problem, TWO).choice.tolist() == [1, 0]
    # 8 for 4 bytes, 5 for one.
    low, high = table.formats
    assert solve(problem, Threshold(low=low, high=high, per="byte")).choice.tolist() == [0, 1]
    with pytest.raises(InputError) as error:
        solve(problem, Threshold(low=low, high=high))
    assert str(error.value) == 'threshold: the units have no shapes; use per="byte" or "unit"'


def test_pins_come_before_the_threshold():
    table = model(1, 2).pin("expert=0,proj=gate", bits=4).pin("expert=1,proj=up", bits=3)
    found = solve(Problem(table, Budget.bits(3.4)), Threshold(low=LOW, high=HIGH))
    assert found.choice[0] == 2
    assert found.choice[4] == 1
    assert set(np.delete(found.choice, [0, 4]).tolist()) <= {0, 2}


def test_the_threshold_is_not_silent_about_its_floor():
    table = model()
    with pytest.raises(InfeasibleError) as error:
        solve(Problem(table, Budget.bits(3)), Threshold(low=MIDDLE, high=HIGH))
    least = table.nbytes[:, 1].sum()
    assert str(error.value) == (
        f"threshold: the rows at int3-g64-asym need {least:.6g}, limit is {3 / 8 * 36 * 8192:.6g}; "
        "raise the limit or take a smaller format"
    )
    with pytest.raises(InputError, match="threshold: no format int8-g64-asym in the table; there"):
        solve(
            Problem(table, Budget.bits(3)),
            Threshold(low=LOW, high=Format(8, 64)),
        )


def test_annealing_is_repeatable_and_near_the_best():
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


def test_annealing_leaves_no_bytes_that_help():
    problem = Problem(model(seed=1), Budget.bits(3.1))
    found = solve(problem, QUICK)
    left = problem.bounds[0] - found.plan.total_bytes
    used = problem.weights[0][np.arange(36), found.choice]
    cheaper = problem.cost < problem.cost[np.arange(36), found.choice][:, None]
    assert (problem.weights[0] - used[:, None])[cheaper].min() > left


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
