"""Helpers of published rules for one limit: the limit itself, choices by rows, and a bound."""

from __future__ import annotations

import numpy as np

from bitknap.allocation.plans.solution import Answer, Status
from bitknap.allocation.problem.arrays import Floats, Ints, Longs, slack
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.solvers.knapsack import Knapsack
from bitknap.errors import InputError

# Share of the final check's rounding tolerance that a rule may use.
SHARE = 0.1


def single(problem: Problem, solver: str) -> tuple[Floats, float]:
    """Return the weights of the one finite limit, float64[R,F], and its bound.

    Raises:
        InputError: there is no finite limit, or more than one.
    """
    finite = np.flatnonzero(np.isfinite(problem.bounds))
    if len(finite) != 1:
        raise InputError(
            f"{solver}: takes one finite limit, the problem has {len(finite)}; "
            f"{'drop some or use Knapsack()' if len(finite) else 'add one'}"
        )
    return problem.weights[finite[0]], float(problem.bounds[finite[0]])


def bounded(problem: Problem, choice: Longs | Ints) -> Answer:
    """Return the choice with the Lagrangian bound, for rules that compute no bound."""
    # Such a wide gap skips the exact pass, so the bound is the dual value.
    bound = Knapsack(gap=0.99, effort=1).answer(problem).bound
    return Answer(choice=choice, bound=bound, status=Status.FEASIBLE)


def cheapest(cost: Floats, weight: Floats) -> Longs:
    """Return the lightest of the cheapest options of each row, int[R]."""
    least = cost == cost.min(axis=1, keepdims=True)
    choice: Longs = np.where(least, weight, np.inf).argmin(axis=1)
    return choice


def lightest(cost: Floats, weight: Floats) -> Longs:
    """Return the cheapest of the lightest options of each row, int[R]."""
    masked = np.where(np.isfinite(cost), weight, np.inf)
    least = masked == masked.min(axis=1, keepdims=True)
    choice: Longs = np.where(least, cost, np.inf).argmin(axis=1)
    return choice


def within(weight: Floats, choice: Longs, bound: float) -> bool:
    """Return whether a choice is within a bound, up to part of the rounding tolerance."""
    used = weight[np.arange(len(choice)), choice]
    return bool(used.sum() <= bound + SHARE * slack(used))
