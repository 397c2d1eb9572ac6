"""Solve a problem with any solver, and believe nothing it says."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np

from bitknap.allocation.arrays import Floats, Ints
from bitknap.allocation.budget import human
from bitknap.allocation.knapsack import Knapsack
from bitknap.allocation.limit import Limit
from bitknap.allocation.plan import BitPlan
from bitknap.allocation.problem import Problem
from bitknap.allocation.solution import Answer, Solution, Status
from bitknap.errors import BitknapError, InfeasibleError

__all__ = ["Answer", "Solver", "solve"]

# Of the sum of absolute summands: what adding n floats in another order may change.
_ROUNDING = 1e-12
# What a plan keeps of its table's provenance.
_CARRIED = ("estimator", "method", "profile", "seed", "text")


class Solver(Protocol):
    """Anything with a name that answers problems."""

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        ...

    def answer(self, problem: Problem) -> Answer:
        """Return the best choice found and a bound on all choices."""
        ...


def solve(problem: Problem, solver: Solver | None = None) -> Solution:
    """Return the solver's plan after checking every limit, its cost and its bound.

    Args:
        problem: a table and limits.
        solver: `Knapsack()` when not given.

    Raises:
        InfeasibleError: no plan is within the limits.
        BitknapError: the solver's answer is wrong, or it found nothing.
    """
    solver = solver or Knapsack()
    _check_each_reachable(problem)
    start = time.perf_counter()
    answer = solver.answer(problem)
    seconds = time.perf_counter() - start
    if answer.choice is None:
        _explain_nothing(problem, answer, solver.name)
        raise BitknapError(f"{solver.name}: found no plan before its own limits; raise them")
    choice = _checked_choice(problem, answer.choice, solver.name)
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
    )


def _plan(problem: Problem, choice: Ints, **result: object) -> BitPlan:
    table = problem.table
    kept = {key: table.provenance[key] for key in _CARRIED if key in table.provenance}
    limits = {limit.name: limit.bound for limit in problem.limits if np.isfinite(limit.bound)}
    return BitPlan.from_choice(
        table.units,
        table.formats,
        choice,
        nbytes=table.nbytes[np.arange(len(choice)), choice],
        model=str(table.provenance.get("model", "")),
        header={**kept, **result, "limits": limits},
    )


def _check_each_reachable(problem: Problem) -> None:
    allowed = np.isfinite(problem.cost)
    for limit, weight, bound in zip(problem.limits, problem.weights, problem.bounds, strict=True):
        least = np.where(allowed, weight, np.inf).min(axis=1)
        # Solvers use a tenth of what the final check allows.
        if least.sum() > bound + 0.1 * slack(least):
            raise InfeasibleError(
                f"{limit.name}: smallest plan needs {_amount(problem, limit, least.sum())}, "
                f"limit is {_amount(problem, limit, bound, rate=False)}{limit.note}; "
                f"raise the limit or add {'a narrower format' if limit.unit else 'formats'}"
            )


def _amount(problem: Problem, limit: Limit, value: float, *, rate: bool = True) -> str:
    if limit.unit != "bytes":
        return f"{value:.6g}"
    if not (rate and problem.table.units.has_shapes):
        return human(value)
    return f"{human(value)} ({8 * value / problem.table.weights:.3g} bpw)"


def _explain_nothing(problem: Problem, answer: Answer, solver: str) -> None:
    """Raise what an answer without a choice means, if the solver claims there is none."""
    if answer.status is not Status.INFEASIBLE:
        return
    from bitknap.allocation.several import clashing

    names = [problem.limits[index].name for index in clashing(problem)]
    if not names:
        raise BitknapError(f"{solver}: says infeasible, but a plan exists; report it")
    if len(names) == 1:
        raise InfeasibleError(f"{names[0]}: no plan is within the limit; raise it or add formats")
    raise InfeasibleError(
        f"limits {' and '.join(names)} clash: each can be met, but not together; "
        "raise one or add formats"
    )


def _checked_choice(problem: Problem, choice: object, solver: str) -> Ints:
    """Return the choice of each unit, after checking it against the original table and limits."""
    rows = np.asarray(choice)
    count, width = problem.cost.shape
    if rows.shape != (count,) or rows.dtype.kind not in "iu":
        raise BitknapError(f"{solver}: answered {rows.dtype} {rows.shape}, expected int ({count},)")
    if (rows < 0).any() or (rows >= width).any():
        raise BitknapError(f"{solver}: chose a format outside 0 to {width - 1}")
    units = problem.expand(rows)
    each = np.arange(len(units))
    if np.isinf(problem.cost[np.arange(count), rows]).any():
        raise BitknapError(f"{solver}: chose a forbidden format")
    for limit in problem.limits:
        full = np.broadcast_to(limit.weight, problem.table.cost.shape)
        used = full[each, units]
        if used.sum() > limit.bound + slack(used):
            raise BitknapError(
                f"{solver}: broke the limit {limit.name}: {used.sum():.17g} of {limit.bound:.17g}"
            )
    return units


def _checked_bound(
    problem: Problem, choice: Ints, bound: float, solver: str
) -> tuple[float, float]:
    costs = problem.table.cost[np.arange(len(choice)), choice]
    cost = float(costs.sum())
    noise = _ROUNDING * float(np.abs(costs).sum())
    if np.isnan(bound) or bound > cost + noise:
        raise BitknapError(f"{solver}: its bound {bound:.17g} is above its own plan's {cost:.17g}")
    # A bound within rounding of the cost proves the plan.
    return cost, cost if bound >= cost - 1e-3 * noise else float(bound)


def slack(summands: Floats) -> float:
    """Return by how much a sum may pass its bound: nothing for whole numbers, else rounding."""
    if np.array_equal(summands, np.floor(summands)):
        return 0.0
    return _ROUNDING * float(np.abs(summands).sum())
