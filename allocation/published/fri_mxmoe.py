"""FRI-MxMoE's allocator: a Lagrangian multiplier found by bisection to meet one limit.

Source: FRI-MxMoE, ACL 2026 (2026.acl-long.982), allocation by Lagrangian relaxation. Its costs are
computed in `bitknap.estimators.published.fri_mxmoe`, which needs torch; this file does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bitknap.allocation.plans.solution import Answer, Status
from bitknap.allocation.problem.arrays import Bools, Floats
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.published.one_limit import cheapest, lightest, single, within
from bitknap.allocation.solvers.lagrangian_dual import Point, evaluate
from bitknap.errors import InputError

_DOUBLINGS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Lagrangian:
    """Each row takes the least of cost + multiplier * weight; bisection meets the limit.

    This is the rule of FRI-MxMoE and many others. Only options on the lower convex hull of a row
    are ever chosen, and room left under the limit stays unused: up to one row's step, or more where
    rows are equal, since equal rows all move at once.

    Attributes:
        multiplier: cost per unit of weight; a given value is used without bisection, so the plan
            may break the limit. The paper's default is 0.25, in its own units.
        rounds: rounds of bisection, each one pass over the table.

    Source: FRI-MxMoE, ACL 2026 (2026.acl-long.982), allocation by Lagrangian relaxation.
    """

    multiplier: float | None = None
    rounds: int = 60

    def __post_init__(self) -> None:
        if self.multiplier is not None and not (0 <= self.multiplier < np.inf):
            raise InputError(f"multiplier: {self.multiplier} is not a number of at least 0")
        if self.rounds < 1:
            raise InputError(f"rounds: {self.rounds} must be above 0")

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        return "lagrangian"

    def answer(self, problem: Problem) -> Answer:
        """Return the plan of the smallest multiplier whose plan fits, and the best dual value seen.

        Raises:
            InputError: not exactly one limit is finite.
        """
        if self.multiplier is not None and len(problem.bounds) == 1:
            return _priced(problem, problem.weights[0], float(problem.bounds[0]), self.multiplier)
        weight, bound = single(problem, self.name)
        if self.multiplier is not None:
            return _priced(problem, weight, bound, self.multiplier)
        choice = cheapest(problem.cost, weight)
        if within(weight, choice, bound):
            cost = float(problem.cost.min(axis=1).sum())
            return Answer(choice=choice, bound=cost, status=Status.OPTIMAL)
        return self._bisected(problem.cost, weight, bound)

    def _bisected(self, cost: Floats, weight: Floats, bound: float) -> Answer:
        def at(multiplier: float) -> Point:
            return evaluate(cost, weight[None], np.array([bound]), np.array([multiplier]))

        low, high = 0.0, _unit(cost, weight)
        point = at(high)
        best = max(float(cost.min(axis=1).sum()), point.value)
        for _ in range(_DOUBLINGS):
            if within(weight, point.choice, bound):
                break
            low, high = high, 2 * high
            point = at(high)
            best = max(best, point.value)
        choice = point.choice
        if not within(weight, choice, bound):
            # Rounding hides the costs at such large multipliers, where plans approach the lightest
            # one.
            choice = lightest(cost, weight)
            if not within(weight, choice, bound):
                return Answer(choice=None, bound=np.inf, status=Status.INFEASIBLE)
        for _ in range(self.rounds):
            point = at((low + high) / 2)
            best = max(best, point.value)
            if within(weight, point.choice, bound):
                high, choice = float(point.multipliers[0]), point.choice
            else:
                low = float(point.multipliers[0])
        # Rounding at large multipliers may lift a dual value above the cost of the plan.
        least = float(cost[np.arange(len(choice)), choice].sum())
        return Answer(choice=choice, bound=min(best, least), status=Status.FEASIBLE)


def _priced(problem: Problem, weight: Floats, bound: float, multiplier: float) -> Answer:
    # An infinite bound adds nothing to the dual.
    room = bound if math.isfinite(bound) else 0.0
    point = evaluate(problem.cost, weight[None], np.array([room]), np.array([multiplier]))
    value = point.value if math.isfinite(bound) else float(problem.cost.min(axis=1).sum())
    return Answer(choice=point.choice, bound=value, status=Status.FEASIBLE)


def _unit(cost: Floats, weight: Floats) -> float:
    """Return the average saving per unit of weight, where bisection starts."""
    allowed: Bools = np.isfinite(cost)
    spans = []
    for values in (cost, weight):
        high = np.where(allowed, values, -np.inf).max(axis=1)
        spans.append(float((high - np.where(allowed, values, np.inf).min(axis=1)).sum()))
    return spans[0] / spans[1] if spans[0] > 0 and spans[1] > 0 else 1.0
