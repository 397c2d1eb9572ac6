"""Solve a problem with any solver, and check its whole answer."""

from __future__ import annotations

import time
from types import MappingProxyType

import numpy as np

from bitknap.allocation.plans.plan import CARRIED, BitPlan
from bitknap.allocation.plans.solution import Solution, Status
from bitknap.allocation.problem.arrays import ROUNDING, Ints, slack
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.solvers.infeasibility import check_each_reachable, clash
from bitknap.allocation.solvers.knapsack import Knapsack
from bitknap.allocation.solvers.solver import Solver
from bitknap.errors import BitknapError

__all__ = ["solve", "within"]


def solve(problem: Problem, solver: Solver | None = None) -> Solution:
    """Return the solver's plan after checking its limits, cost and bound.

    Args:
        problem: a table and limits.
        solver: `Knapsack()` when not given.

    Raises:
        InfeasibleError: no plan is within the limits.
        BitknapError: the solver's answer is wrong, or it found no plan.
    """
    solver = solver or Knapsack()
    check_each_reachable(problem)
    start = time.perf_counter()
    answer = solver.answer(problem)
    seconds = time.perf_counter() - start
    if answer.choice is None:
        if answer.status is Status.INFEASIBLE:
            raise clash(problem, solver.name)
        raise BitknapError(f"{solver.name}: found no plan before its own limits; raise them")
    choice = _checked_choice(problem, answer.choice, solver.name)
    used = _checked_use(problem, choice, solver.name)
    cost, bound = _checked_bound(problem, choice, answer.bound, solver.name)
    plan = _plan(problem, choice, solver=solver.name, objective=cost, bound=bound)
    return Solution(
        status=Status.OPTIMAL if cost <= bound else answer.status,
        plan=plan,
        choice=plan.choice,
        cost=cost,
        bound=bound,
        seconds=seconds,
        solver=solver.name,
        used=MappingProxyType(used),
    )


def within(problem: Problem, plan: BitPlan) -> bool:
    """Return whether a plan of the problem's units keeps to its formats, ties and limits."""
    table = problem.table
    if not plan.units.same_as(table.units) or not set(plan.formats) <= set(table.formats):
        return False
    column = np.array([table.formats.index(item) for item in plan.formats])[plan.choice]
    rows = column[np.unique(problem.row_of, return_index=True)[1]]
    each = np.arange(len(rows))
    if not np.array_equal(rows[problem.row_of], column):
        return False
    if not np.isfinite(problem.cost[each, rows]).all():
        return False
    used = problem.weights[:, each, rows]
    return all(
        one.sum() <= bound + slack(one) for one, bound in zip(used, problem.bounds, strict=True)
    )


def _plan(problem: Problem, choice: Ints, **result: object) -> BitPlan:
    table = problem.table
    kept = {key: table.provenance[key] for key in CARRIED if key in table.provenance}
    bounded = [limit for limit in problem.limits if np.isfinite(limit.bound)]
    limits: dict[str, object] = {
        "limits": {limit.name: limit.shown(limit.bound) for limit in bounded}
    }
    if floors := [limit.name for limit in bounded if limit.floor]:
        limits["floors"] = floors
    return BitPlan.from_choice(
        table.units,
        table.formats,
        choice,
        nbytes=table.nbytes[np.arange(len(choice)), choice],
        model=str(table.provenance.get("model", "")),
        header={**kept, **result, **limits},
    )


def _checked_choice(problem: Problem, choice: object, solver: str) -> Ints:
    """Return the choice of each unit, after checking that it is one."""
    rows = np.asarray(choice)
    count, width = problem.cost.shape
    if rows.shape != (count,) or rows.dtype.kind not in "iu":
        raise BitknapError(f"{solver}: answered {rows.dtype} {rows.shape}, expected int ({count},)")
    if (rows < 0).any() or (rows >= width).any():
        raise BitknapError(f"{solver}: chose a format outside 0 to {width - 1}")
    if np.isinf(problem.cost[np.arange(count), rows]).any():
        raise BitknapError(f"{solver}: chose a forbidden format")
    return problem.expand(rows)


def _checked_use(problem: Problem, choice: Ints, solver: str) -> dict[str, float]:
    """Return how much a choice of each unit uses of each limit, after checking the bounds."""
    each, shown = np.arange(len(choice)), {}
    for limit in problem.limits:
        used = np.broadcast_to(limit.weight, problem.table.cost.shape)[each, choice]
        total = float(used.sum())
        if total > limit.bound + slack(used):
            raise BitknapError(
                f"{solver}: broke the limit {limit.name}: {limit.shown(total):.17g} of "
                f"{limit.shown(limit.bound):.17g}"
            )
        shown[limit.name] = limit.shown(total)
    return shown


def _checked_bound(
    problem: Problem, choice: Ints, bound: float, solver: str
) -> tuple[float, float]:
    costs = problem.table.cost[np.arange(len(choice)), choice]
    cost = float(costs.sum())
    noise = ROUNDING * float(np.abs(costs).sum())
    if np.isnan(bound) or bound > cost + noise:
        raise BitknapError(f"{solver}: its bound {bound:.17g} is above its own plan's {cost:.17g}")
    # A bound within rounding error of the cost proves the plan optimal.
    return cost, cost if bound >= cost - 1e-3 * noise else float(bound)
