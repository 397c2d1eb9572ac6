"""From a table and a budget to a plan, with the default profile; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from bitknap.allocation import Budget, CostTable, Limit, Problem, Solution, Solver, profile, solve
from bitknap.allocation.tradeoffs.profile_price import under

DEFAULT_PROFILE = "gate_eq_up"


def plan_for(
    table: CostTable,
    budget: Budget,
    *,
    profile_name: str = DEFAULT_PROFILE,
    solver: Solver | None = None,
    limits: Sequence[Limit] = (),
) -> Solution:
    """Return the solved plan of a table at a budget, units tied as the profile says.

    Raises:
        InputError: the profile is unknown, or the table lacks what the budget refers to.
        InfeasibleError: no plan fits; says the least reachable.
    """
    return solve(Problem(under(table, profile(profile_name)), [budget, *limits]), solver)
