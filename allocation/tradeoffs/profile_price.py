"""The price of a runtime: the extra cost of its grouping rule at the same limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bitknap.allocation.plans.solution import Solution, Status
from bitknap.allocation.problem.budget import Budget
from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.problem.profiles import PROFILES, Profile
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.solvers.solver import Solver
from bitknap.allocation.solvers.solving import solve
from bitknap.errors import InfeasibleError, InputError

_FREE = PROFILES["free"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Price:
    """The cost of one profile.

    Attributes:
        profile: the rule.
        solution: the checked plan under it; None when no plan is within the limits.
        ratio: cost over the cost of `free` within the same limits; None when either is missing
            or `free` does not cost more than 0.
        reason: why there is no plan, and the smallest reachable; "" when there is one.
    """

    profile: Profile
    solution: Solution | None
    ratio: float | None
    reason: str = ""

    @property
    def status(self) -> Status:
        """Optimal, feasible or infeasible."""
        return Status.INFEASIBLE if self.solution is None else self.solution.status

    @property
    def cost(self) -> float:
        """Cost of the plan, nats per token; +inf without one."""
        return float("inf") if self.solution is None else self.solution.cost

    @property
    def bound(self) -> float:
        """Lower bound on the cost of plans under the profile; +inf when there are none."""
        return float("inf") if self.solution is None else self.solution.bound

    @property
    def seconds(self) -> float:
        """Wall time of the solver."""
        return 0.0 if self.solution is None else self.solution.seconds


def price(
    table: CostTable,
    limits: Sequence[Limit | Budget] | Limit | Budget,
    profiles: Mapping[str, Profile] | Iterable[Profile] = PROFILES,
    solver: Solver | None = None,
) -> tuple[Price, ...]:
    """Solve the same limits under each profile and compare with choosing freely.

    Args:
        table: the costs; its own ties and pins hold under every profile.
        limits: the limits, as `Problem` takes them.
        profiles: rules to compare, in this order.
        solver: `Knapsack()` when not given.

    Raises:
        InputError: the limits do not belong to the table.
    """
    chosen = list(profiles.values() if isinstance(profiles, Mapping) else profiles)
    # Without any profile: errors here are about the limits, not about a profile.
    problem = Problem(table, limits)
    free, reason = _tried(problem, solver)
    least = None if free is None else free.cost
    prices = []
    for rule in chosen:
        solution, why = (free, reason) if rule == _FREE else _under(rule, table, limits, solver)
        ratio = solution.cost / least if solution is not None and least and least > 0 else None
        prices.append(Price(profile=rule, solution=solution, ratio=ratio, reason=why))
    return tuple(prices)


def under(table: CostTable, rule: Profile) -> CostTable:
    """Return the table tied by a profile, with its name in the provenance."""
    return replace(table.tie(rule), provenance={**table.provenance, "profile": rule.name})


def priced(prices: Sequence[Price], chosen: str) -> dict[str, Any]:
    """Return prices as JSON values under "price"; nothing when there are none."""
    rows = [
        {
            "profile": one.profile.name,
            "status": one.status.name,
            "cost": None if one.solution is None else one.cost,
            "bound": None if one.solution is None else one.bound,
            "ratio": one.ratio,
            "bits_per_weight": one.solution and one.solution.plan.totals["bits_per_weight"],
            "seconds": round(one.seconds, 6),
            "chosen": one.profile.name == chosen,
            "reason": one.reason,
        }
        for one in prices
    ]
    return {"price": rows} if rows else {}


def _under(
    rule: Profile,
    table: CostTable,
    limits: Sequence[Limit | Budget] | Limit | Budget,
    solver: Solver | None,
) -> tuple[Solution | None, str]:
    try:
        problem = Problem(under(table, rule), limits)
    except InputError as error:
        # The pins contradict each other once their units are tied.
        return None, str(error)
    return _tried(problem, solver)


def _tried(problem: Problem, solver: Solver | None) -> tuple[Solution | None, str]:
    try:
        return solve(problem, solver), ""
    except InfeasibleError as error:
        return None, str(error)
