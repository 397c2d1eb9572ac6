"""From a table and a budget to a plan, with the default profile; needs no torch."""

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
        budget: Bytes that the plan keeps to.
        ties: Which units share a format; `DEFAULT_PROFILE` when not given.
        solver: The knapsack when not given.
        limits: What else the plan keeps to.

    Raises:
        InputError: The table lacks what the budget refers to.
        InfeasibleError: No plan fits; says the least reachable.
    """
    tied = under(table, ties or profile(DEFAULT_PROFILE))
    return solve(Problem(tied, [budget, *limits]), solver)
