from dataclasses import dataclass

import numpy as np
import pytest

from bitknap.allocation import (
    Answer,
    Budget,
    CostTable,
    Knapsack,
    Limit,
    Problem,
    Status,
    formats,
    profile,
    solve,
)
from bitknap.errors import BitknapError, InfeasibleError, InputError
from bitknap.testing import routed_units

COST = [[9.0, 4.0, 1.0], [5.0, 3.0, 2.0]]
NBYTES = [[1, 2, 4], [1, 2, 4]]


def problem(bound: float = 6) -> Problem:
    return Problem(CostTable.from_arrays(COST, NBYTES), Budget.bytes(int(bound)))


@dataclass(frozen=True)
class Fixed:
    """Answers what it is told."""

    choice: object
    bound: float = -1.0
    status: Status = Status.FEASIBLE
    name: str = "fixed"

    def answer(self, problem: Problem) -> Answer:
        return Answer(choice=self.choice, bound=self.bound, status=self.status)  # type: ignore[arg-type]


def test_a_solution_says_how_good_it_is():
    # 4 + 2 bytes: the first unit wide saves 8 and the second in the middle saves 2.
    found = solve(problem(6))
    assert found.choice.tolist() == [2, 1]
    assert (found.cost, found.bound, found.gap) == (4.0, 4.0, 0.0)
    assert found.status is Status.OPTIMAL
    assert found.solver == "knapsack"
    assert found.plan.nbytes.tolist() == [4, 2]
    assert dict(found.plan.header) == {
        "solver": "knapsack",
        "objective": 4.0,
        "bound": 4.0,
        "limits": {"memory": 6.0},
    }


def test_an_honest_gap_is_reported():
    found = solve(problem(6), Fixed(np.array([1, 1]), bound=3.5))
    assert (found.cost, found.bound) == (7.0, 3.5)
    assert found.gap == 0.5
    assert found.status is Status.FEASIBLE


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (Fixed(np.array([2, 2])), "fixed: broke the limit memory: 8 of 6"),
        (Fixed(np.array([0, 3])), "fixed: chose a format outside 0 to 2"),
        (Fixed(np.array([0, -1])), "fixed: chose a format outside 0 to 2"),
        (Fixed(np.array([0])), "fixed: answered int64 (1,), expected int (2,)"),
        (Fixed(np.array([0.0, 1.0])), "fixed: answered float64 (2,), expected int (2,)"),
        (
            Fixed(np.array([2, 1]), bound=4.1),
            "fixed: its bound 4.0999999999999996 is above its own",
        ),
        (Fixed(np.array([2, 1]), bound=float("nan")), "fixed: its bound nan is above"),
        (Fixed(None), "fixed: found no plan before its own limits; raise them"),
        (
            Fixed(None, status=Status.INFEASIBLE),
            "fixed: says infeasible, but a plan exists; report it",
        ),
    ],
)
def test_a_solver_is_never_trusted(solver, message):
    with pytest.raises(BitknapError) as error:
        solve(problem(6), solver)
    assert message in str(error.value)


def test_a_forbidden_choice_is_refused():
    table = CostTable.from_arrays([[np.inf, 1.0]], [[1, 2]])
    with pytest.raises(BitknapError, match="fixed: chose a forbidden format"):
        solve(Problem(table, Budget.bytes(5)), Fixed(np.array([0])))


def test_too_small_a_budget_says_what_is_needed():
    units = routed_units(1, 4, ("up",), rows=1024, cols=1024)
    table = CostTable.from_arrays(
        np.ones((4, 2)), units=units, formats=formats(bits=(2, 4), group_size=128)
    )
    # 2 bits and 32 bits of scale and zero for every 128 weights.
    with pytest.raises(InfeasibleError) as error:
        solve(Problem(table, Budget.bits(2)))
    assert str(error.value) == (
        "memory: smallest plan needs 1.125 MiB (2.25 bpw), limit is 1 MiB; "
        "raise the limit or add a narrower format"
    )
    with pytest.raises(InfeasibleError) as error:
        solve(Problem(table, Limit("reads", table.nbytes, 5.5)))
    assert str(error.value) == (
        "reads: smallest plan needs 1.17965e+06, limit is 5.5; raise the limit or add formats"
    )


def test_limits_that_clash_are_named():
    table = CostTable.from_arrays(np.zeros((2, 2)), np.ones((2, 2), dtype=int))
    limits: list[Limit | Budget] = [
        Limit("left", np.array([[0.0, 1.0]]), 0.5),
        Budget.bytes(10),
        Limit("right", np.array([[1.0, 0.0]]), 1.5),
    ]
    with pytest.raises(InfeasibleError) as error:
        solve(Problem(table, limits))
    assert str(error.value) == (
        "limits left and right clash: each can be met, but not together; "
        "raise left from 0.5 to 1, or raise right from 1.5 to 2, or add formats"
    )


def test_tied_units_share_a_format():
    units = routed_units(1, 1, ("gate", "up", "down"), rows=64, cols=64)
    cost = [[8.0, 1.0], [2.0, 1.0], [6.0, 1.0]]
    table = CostTable.from_arrays(cost, units=units, formats=formats(bits=(2, 4), group_size="row"))
    budget = Budget.bytes(int(table.nbytes[:, 0].sum()) + 1024)
    assert solve(Problem(table, budget)).choice.tolist() == [1, 0, 0]
    # Gate and up together are now too large.
    tied = solve(Problem(table.tie(profile("gate_eq_up")), budget))
    assert tied.choice.tolist() == [0, 0, 1]
    assert tied.cost == 11.0


def test_limits_without_a_bound_and_no_limits():
    table = CostTable.from_arrays(COST, NBYTES)
    assert solve(Problem(table, [])).choice.tolist() == [2, 2]
    assert solve(Problem(table, Limit("any", table.nbytes, np.inf))).choice.tolist() == [2, 2]


def test_settings_are_checked():
    for wrong in ({"gap": -1}, {"gap": 1}, {"states": 0}, {"effort": 0}, {"time_limit": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Knapsack(**wrong)
