"""From a table and a budget to a plan, with the default profile; needs no torch."""

from __future__ import annotations

from dataclasses import replace

from bitknap.allocation import Budget, CostTable, Problem, Solution, Solver, profile, solve

DEFAULT_PROFILE = "gate_eq_up"


def plan_for(
    table: CostTable,
    budget: Budget,
    *,
    profile_name: str = DEFAULT_PROFILE,
    solver: Solver | None = None,
) -> Solution:
    """Return the solved plan of a table at a budget, units tied as the profile says.

    Raises:
        InputError: the profile is unknown, or the table lacks what the budget refers to.
        InfeasibleError: no plan fits; says the least reachable.
    """
    tied = table.tie(profile(profile_name))
    named = replace(tied, provenance={**table.provenance, "profile": profile_name})
    return solve(Problem(named, [budget]), solver)
