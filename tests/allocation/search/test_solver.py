"""Search: never worse than the knapsack by the objective, always within the limits."""

import numpy as np
import pytest

from bitknap.allocation import (
    Budget,
    Knapsack,
    Limit,
    Problem,
    Status,
    formats,
    profile,
    solve,
)
from bitknap.allocation.search.solver import Search
from bitknap.errors import BitknapError, InputError, MismatchError
from bitknap.testing import random_table, routed_units


def table(seed=0, layers=3, experts=4):
    return random_table(routed_units(layers, experts), formats((2, 3, 4, 8), 8), seed)


@pytest.fixture
def problem():
    return Problem(table(), [Budget.bits(6.5)])


def hidden(given):
    """Return a loss where the last layer counts ten times as much as the table says."""
    weight = np.where(given.table.units.layer == 2, 10.0, 1.0)
    each = np.arange(len(weight))

    def loss(choice):
        return float((weight * given.table.cost[each, choice]).sum())

    return loss


def test_the_tables_own_cost_gives_the_knapsacks_plan(problem):
    found = solve(problem, Search(trials=8))
    exact = solve(problem, Knapsack())
    assert found.choice.tolist() == exact.choice.tolist()
    assert (found.cost, found.bound) == (exact.cost, exact.bound)
    assert found.status is exact.status is Status.OPTIMAL
    assert found.plan.header["solver"] == "search"


@pytest.mark.parametrize("sampler", ["cmaes", "tpe"])
def test_another_objective_is_followed(problem, sampler):
    loss = hidden(problem)
    exact = solve(problem)
    found = solve(problem, Search(objective=loss, trials=40, sampler=sampler, width=2.0))
    assert loss(found.choice) < loss(exact.choice)
    assert found.cost > exact.cost >= found.bound == exact.bound
    assert found.status is Status.FEASIBLE
    assert found.plan.total_bytes <= problem.bounds[0]


def test_equal_seeds_give_equal_plans(problem):
    search = Search(objective=hidden(problem), trials=15, seed=3)
    first, second = (solve(problem, search).choice for _ in range(2))
    assert np.array_equal(first, second)


def test_equal_plans_are_measured_once(problem):
    seen = []

    def count(choice):
        seen.append(choice.tobytes())
        return float(len(seen))

    answer = Search(objective=count, trials=30, width=0.01).answer(problem)
    assert len(seen) == len(set(seen)) < 30
    assert np.array_equal(problem.expand(answer.choice), solve(problem).choice)


def test_the_untilted_plan_is_measured_first(problem):
    seen = []

    def keep(choice):
        seen.append(choice)
        return 0.0

    Search(objective=keep, trials=3).answer(problem)
    assert np.array_equal(seen[0], solve(problem).choice)


def test_tied_units_and_several_limits_are_kept():
    tied = table().tie(profile("expert"))
    weight = (tied.units.layer == 2)[:, None] * tied.nbytes
    limits: list[Budget | Limit] = [Budget.bits(6.5)]
    limits.append(Limit("last layer", weight, 0.8 * weight.max(1).sum()))
    given = Problem(tied, limits)
    found = solve(given, Search(objective=hidden(given), trials=10))
    for tie in np.unique(given.row_of):
        assert len(set(found.choice[given.row_of == tie].tolist())) == 1


def test_a_value_that_is_no_number_is_passed_over(problem):
    values = iter([float("nan"), 5.0, 4.0, float("nan")] + [6.0] * 50)
    answer = Search(objective=lambda choice: next(values), trials=12, width=3.0).answer(problem)
    assert answer.choice is not None


def test_no_number_at_all_is_an_error(problem):
    with pytest.raises(BitknapError) as error:
        Search(objective=lambda choice: float("nan"), trials=4).answer(problem)
    assert str(error.value) == (
        "search: all 4 trials failed, the last because the objective is nan; "
        "return a number from the objective"
    )


def test_an_error_of_the_objective_comes_through(problem):
    def broken(choice):
        raise ZeroDivisionError("by the user")

    with pytest.raises(ZeroDivisionError):
        Search(objective=broken, trials=4).answer(problem)


def test_nothing_within_the_limits_is_said(problem):
    weight = np.where(np.arange(4) == 0, 0.0, 1.0)[None, :]
    given = Problem(problem.table, [Limit("a", weight, 0), Limit("b", 1 - weight, 0)])
    assert Search(trials=1).answer(given).status is Status.INFEASIBLE


def test_a_stored_search_goes_on(problem, tmp_path):
    url, seen = f"journal:{tmp_path}/search.log", []
    loss = hidden(problem)

    def watched(choice):
        seen.append(choice.tobytes())
        return loss(choice)

    def search(trials, **options):
        return solve(problem, Search(objective=watched, trials=trials, storage=url, **options))

    first = search(4)
    second = search(12)
    assert len(seen) == len(set(seen))
    assert loss(second.choice) <= loss(first.choice)
    memory = solve(problem, Search(objective=loss, trials=16))
    assert np.array_equal(second.choice, memory.choice)
    other = Problem(table(seed=1), [Budget.bits(6.5)])
    with pytest.raises(
        MismatchError, match=r"study 'search' in journal:.* belongs to another problem"
    ):
        Search(trials=1, storage=url).answer(other)


def test_progress_is_reported(problem):
    told = []
    Search(trials=3, progress=lambda *step: told.append(step)).answer(problem)
    assert told == [("search", 0, 3), ("search", 1, 3), ("search", 2, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials: 0 must be at least 1"),
        ({"sampler": "grid"}, "sampler 'grid' is unknown; one of cmaes, tpe"),
        ({"width": 0.0}, "width: 0.0 is not above 0 and at most 10"),
        ({"groups": ()}, "groups: name at least one column, such as 'layer'"),
        (
            {"groups": ("row",)},
            "tilt 'row' is unknown; one of layer, role, expert, proj; did you mean role?",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError) as error:
        Search(**options)
    assert str(error.value) == message
