"""Published rules for one limit: a multiplier found by bisection, and a threshold on two formats.

What they share is here too: the one limit they take, and a bound that they do not compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from bitknap.allocation.plans.solution import Answer, Status
from bitknap.allocation.problem.arrays import Bools, Floats, Ints, Longs, slack
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.solvers.knapsack import Knapsack
from bitknap.allocation.solvers.lagrangian_dual import Point, evaluate
from bitknap.errors import InfeasibleError, InputError

# Of what the final check allows for rounding.
_SHARE = 0.1
_DOUBLINGS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Lagrangian:
    """Each row takes the least of cost + multiplier * weight; bisection meets the limit.

    The rule of FRI-MxMoE, and of many others. Only options on the lower convex hull of a row are
    ever chosen, and nothing fills what is left under the limit: up to one row's step, or more
    where rows are alike, since equal rows all move at once.

    Attributes:
        multiplier: cost for each unit of weight; a given one is used as it is and steers towards
            no limit, so the plan may break it. The paper's default is 0.25, in its own units.
        rounds: of bisection, each one pass over the table.

    Source: FRI-MxMoE, ACL 2026 (2026.acl-long.982), allocation by Lagrangian relaxation.
    """

    multiplier: float | None = None
    rounds: int = 60

    def __post_init__(self) -> None:
        if self.multiplier is not None and not (0 <= self.multiplier < np.inf):
            raise InputError(f"multiplier: {self.multiplier} is not a number from 0")
        if self.rounds < 1:
            raise InputError(f"rounds: {self.rounds} must be above 0")

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        return "lagrangian"

    def answer(self, problem: Problem) -> Answer:
        """Return the plan of the smallest multiplier that fits, and the best dual value seen.

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
            # Rounding hides the costs at such multipliers: the lightest plan is their limit.
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
        # Rounding at large multipliers may lift a dual value above what a plan costs.
        least = float(cost[np.arange(len(choice)), choice].sum())
        return Answer(choice=choice, bound=min(best, least), status=Status.FEASIBLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Two formats; the rows that gain most from the better one get it.

    The rule of mlx-lm's dynamic quantization and of ModelOpt's `kl_div` search: a row whose
    sensitivity, cost at `low` minus cost at `high`, passes a threshold gets `high`. Theirs find
    the threshold by bisection and fall back to all `low` in silence when even that is too large;
    here it is the one whose plan is the largest that fits, and too small a limit is an error.
    Rows of equal sensitivity stay together, as any threshold keeps them. Rows that may have one
    of the two get it; rows that may have neither get their lightest format.

    Attributes:
        low: the format below the threshold.
        high: the format above it.
        per: what the sensitivity is divided by: "weight", weights of the row (mlx-lm, there in
            millions); "byte", what `high` adds to the limit; "unit", nothing (ModelOpt).

    Source: mlx-lm, `dynamic_quant`; NVIDIA ModelOpt, `auto_quantize`. Theirs estimate the
    sensitivity by first-order gradients and by forward KL; here it is the table's.
    """

    low: Format
    high: Format
    per: Literal["weight", "byte", "unit"] = "weight"

    def __post_init__(self) -> None:
        if self.low == self.high:
            raise InputError(f"threshold: low and high are both {self.low}; give two formats")
        known = get_args(Literal["weight", "byte", "unit"])
        if self.per not in known:
            raise InputError(f"per: {self.per!r} is not one of {', '.join(known)}")

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        return "threshold"

    def answer(self, problem: Problem) -> Answer:
        """Return the largest plan of any threshold that fits, and a bound on all plans.

        Raises:
            InputError: not exactly one limit is finite, or a format or a shape is missing.
            InfeasibleError: no threshold's plan fits.
        """
        weight, bound = single(problem, self.name)
        low, high = self._column(problem, self.low), self._column(problem, self.high)
        allowed = np.isfinite(problem.cost)
        choice = np.where(allowed[:, high], high, lightest(problem.cost, weight))
        choice[allowed[:, low]] = low
        free = np.flatnonzero(allowed[:, low] & allowed[:, high])
        added = weight[free, high] - weight[free, low]
        gained = problem.cost[free, low] - problem.cost[free, high]
        score = gained / self._sizes(problem, free, added)
        order = np.argsort(-score, kind="stable")
        base = weight[np.arange(len(choice)), choice]
        used = base.sum() + np.concatenate([[0.0], np.cumsum(added[order])])
        # No threshold separates equal scores.
        falls = score[order][1:] < score[order][:-1]
        whole = np.concatenate([[True], falls, [True]])[: len(used)]
        fits = whole & (used <= bound + _SHARE * slack(np.concatenate([base, added])))
        if not fits.any():
            raise InfeasibleError(
                f"threshold: the rows at {self.low} need {used.min():.6g}, limit is {bound:.6g}; "
                "raise the limit or take a smaller format"
            )
        choice[free[order[: int(np.flatnonzero(fits)[-1])]]] = high
        return bounded(problem, choice)

    def _column(self, problem: Problem, item: Format) -> int:
        if item not in problem.table.formats:
            names = ", ".join(str(known) for known in problem.table.formats)
            raise InputError(f"threshold: no format {item} in the table; there are {names}")
        return problem.table.formats.index(item)

    def _sizes(self, problem: Problem, rows: Longs, added: Floats) -> Floats:
        if self.per == "unit":
            return np.ones(len(rows))
        if self.per == "byte":
            if not (added > 0).all():
                raise InputError(f"threshold: {self.high} is no larger than {self.low}; swap them")
            return added
        if not problem.table.units.has_shapes:
            raise InputError('threshold: the units have no shapes; use per="byte" or "unit"')
        numel = np.bincount(problem.row_of, weights=problem.table.units.numel)
        return np.asarray(numel[rows], dtype=np.float64)


def single(problem: Problem, solver: str) -> tuple[Floats, float]:
    """Return the weights of the one finite limit, float64[R,F], and its bound.

    Raises:
        InputError: there is none, or more than one.
    """
    finite = np.flatnonzero(np.isfinite(problem.bounds))
    if len(finite) != 1:
        raise InputError(
            f"{solver}: takes one finite limit, the problem has {len(finite)}; "
            f"{'drop some or use Knapsack()' if len(finite) else 'add one'}"
        )
    return problem.weights[finite[0]], float(problem.bounds[finite[0]])


def bounded(problem: Problem, choice: Longs | Ints) -> Answer:
    """Return a choice with the Lagrangian bound, which rules without a proof do not compute."""
    # So wide a gap leaves the exact pass out; the bound is the dual value alone.
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
    """Return whether a choice is within a bound, up to a part of the rounding that is allowed."""
    used = weight[np.arange(len(choice)), choice]
    return bool(used.sum() <= bound + _SHARE * slack(used))


def _priced(problem: Problem, weight: Floats, bound: float, multiplier: float) -> Answer:
    # A limit without a bound adds nothing to the dual.
    room = bound if math.isfinite(bound) else 0.0
    point = evaluate(problem.cost, weight[None], np.array([room]), np.array([multiplier]))
    value = point.value if math.isfinite(bound) else float(problem.cost.min(axis=1).sum())
    return Answer(choice=point.choice, bound=value, status=Status.FEASIBLE)


def _unit(cost: Floats, weight: Floats) -> float:
    """Return the average saving for a unit of weight, where bisection starts."""
    allowed: Bools = np.isfinite(cost)
    spans = []
    for values in (cost, weight):
        high = np.where(allowed, values, -np.inf).max(axis=1)
        spans.append(float((high - np.where(allowed, values, np.inf).min(axis=1)).sum()))
    return spans[0] / spans[1] if spans[0] > 0 and spans[1] > 0 else 1.0
