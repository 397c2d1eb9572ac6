"""The answer of a solver, and the checked solution made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Ints, Longs


class Status(Enum):
    """How good a plan is; the value is the sentence shown to users."""

    OPTIMAL = "optimal: no plan within the limits costs less"
    FEASIBLE = "feasible: within the limits, and the gap bounds what is left to gain"
    INFEASIBLE = "infeasible: no plan is within the limits"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """The answer of a solver, not yet checked.

    Attributes:
        choice: chosen format of each row, int[R], or None.
        bound: lower bound on the cost of every plan within the limits, nats per token.
        status: the status that the solver claims.
    """

    choice: Ints | Longs | None
    bound: float
    status: Status


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """A checked plan and how good it is.

    Attributes:
        status: optimal or feasible.
        plan: the plan.
        choice: chosen format of each unit, int32[U].
        cost: cost of the plan, recomputed from the table, nats per token.
        bound: lower bound on the cost of every plan within the limits, nats per token.
        seconds: wall time of the solver.
        solver: name of the solver.
        used: the amount that the plan uses of each limit, or reaches for a floor ("at least"), by
            the limit's name, in the limit's own unit: bytes, a count, a share from 0 to 1, bits per
            weight.
    """

    status: Status
    plan: BitPlan
    choice: Ints
    cost: float
    bound: float
    seconds: float
    solver: str
    used: Mapping[str, float]

    @property
    def gap(self) -> float:
        """How much cheaper the best plan could be, relative to the cost; 0 when proven."""
        if self.cost <= self.bound:
            return 0.0
        return (self.cost - self.bound) / max(abs(self.cost), 1e-300)
