"""Solve a table for a budget, with the default profile; does not need torch."""

from __future__ import annotations

from collections.abc import Sequence

from bitknap.allocation import (
    Budget,
    CostTable,
    Limit,
    Problem,
    Profile,
    Solution,
    Solver,
    profile,
    solve,
)
from bitknap.allocation.tradeoffs.profile_price import under

DEFAULT_PROFILE = "gate_eq_up"


def plan_for(
    table: CostTable,
    budget: Budget,
    *,
    ties: Profile | None = None,
    solver: Solver | None = None,
    limits: Sequence[Limit] = (),
) -> Solution:
    """Return the solved plan of a table at a budget.

    Args:
        table: Costs and bytes of every format of every unit.
        budget: Maximum size of the plan.
        ties: Which units share a format; `DEFAULT_PROFILE` when not given.
        solver: The knapsack when not given.
        limits: Further limits on the plan.

    Raises:
        InputError: The table lacks a quantity that the budget refers to.
        InfeasibleError: No plan fits; the message gives the smallest reachable value.
    """
    tied = under(table, ties or profile(DEFAULT_PROFILE))
    return solve(Problem(tied, [budget, *limits]), solver)
