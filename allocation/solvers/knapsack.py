"""The default solver: exact for one limit in practice, always with a proven gap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitknap.allocation.plans.solution import Answer, Status
from bitknap.allocation.problem.arrays import Floats, Longs
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.solvers.exact_core import Improvement, collect, improve
from bitknap.allocation.solvers.lower_hulls import (
    Options,
    Steps,
    common_divisor,
    fitting,
    options,
    split,
    steps,
)
from bitknap.errors import InputError

# Costs are sums of R rounded numbers; relative differences below this are noise.
_NOISE = 2e-16
# Number of steps to try after the break, where a smaller one may still fit.
_FILL = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Knapsack:
    """Lagrangian dual by sorted hull slopes, greedy fill, then an exact pass over the core.

    Deterministic. One limit with weights from 0 needs NumPy alone; several limits or negative
    weights go through `bitknap.allocation.solvers.many_limits` and HiGHS.

    Attributes:
        gap: stop when the plan is proven within this share of the optimum; 0 proves optimality.
        states: most partial plans to keep at a time in the exact pass.
        effort: stop the exact pass after this many partial plans; the bound stays valid.
        time_limit: seconds for HiGHS, when it is needed.
    """

    gap: float = 0.0
    states: int = 50_000
    effort: int = 20_000_000
    time_limit: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.gap < 1:
            raise InputError(f"gap: {self.gap} is not a share of at least 0 and below 1")
        for name in ("states", "effort", "time_limit"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}: {getattr(self, name)} must be above 0")

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        return "knapsack"

    def answer(self, problem: Problem) -> Answer:
        """Return the best choice found, proven optimal unless `states` or `effort` run out."""
        finite = np.isfinite(problem.bounds)
        if not finite.any():
            return _unlimited(problem)
        weight = problem.weights[int(finite.argmax())]
        if finite.sum() > 1 or (weight < 0).any():
            return self._several(problem)
        bound = float(problem.bounds[finite][0])
        pruned = options(fitting(problem.cost, weight, bound), weight)
        edges = steps(pruned)
        if not np.isfinite(edges.gain).all():
            # The slopes overflow floats; HiGHS scales its input.
            return self._several(problem)
        return self._single(pruned, edges, bound)

    def _several(self, problem: Problem) -> Answer:
        from bitknap.allocation.solvers.highs import run
        from bitknap.allocation.solvers.many_limits import answer

        finite = np.isfinite(problem.bounds)
        weights, bounds = problem.weights[finite], problem.bounds[finite]
        return answer(problem.cost, weights, bounds, run, gap=self.gap, time_limit=self.time_limit)

    def _single(self, pruned: Options, edges: Steps, bound: float) -> Answer:
        lightest = np.argmax(pruned.hull, axis=0)
        divisor = common_divisor(pruned)
        room = _room(pruned, lightest, bound, divisor)
        if room < 0:
            return Answer(choice=None, bound=np.inf, status=Status.INFEASIBLE)
        taken, left = split(edges, room)
        base = _advanced(lightest, edges, taken)
        cost = _total(pruned.cost, base)
        if not len(left):
            return _answer(pruned, base, cost, Status.OPTIMAL)
        multiplier = float(edges.gain[left[0]])
        room = max(_room(pruned, base, bound, divisor), 0.0)
        dual = cost - multiplier * room
        best, saved = _filled(base, edges, left, room)
        gap, above = multiplier * room - saved, 0.0
        each = pruned.cost[base, np.arange(len(base))]
        enough = self.gap * abs(cost - saved) + _NOISE * float(np.abs(each).sum())
        if gap > enough:
            core = collect(
                pruned.cost, pruned.weight, base, multiplier=multiplier, room=room, gap=gap
            )
            better = improve(core, gap=gap, enough=enough, states=self.states, effort=self.effort)
            best, above, gap = _moved(base, best, better), better.above, better.gap
        cost = _total(pruned.cost, best)
        if above < gap - enough or self.gap:
            return _answer(pruned, best, min(dual + above, cost), Status.FEASIBLE)
        return _answer(pruned, best, cost, Status.OPTIMAL)


def _answer(pruned: Options, position: Longs, bound: float, status: Status) -> Answer:
    choice = pruned.option[position, np.arange(len(position))]
    return Answer(choice=choice, bound=bound, status=status)


def _total(values: Floats, position: Longs) -> float:
    return float(values[position, np.arange(len(position))].sum())


def _unlimited(problem: Problem) -> Answer:
    choice = problem.cost.argmin(axis=1)
    cost = float(problem.cost.min(axis=1).sum())
    return Answer(choice=choice, bound=cost, status=Status.OPTIMAL)


def _room(pruned: Options, position: Longs, bound: float, divisor: float) -> float:
    """Return the usable weight left under the bound; below 0 if the plan is too heavy."""
    used = _total(pruned.weight, position)
    if divisor:
        return float(divisor * np.floor((bound - used) / divisor))
    # A tenth of the final check's rounding tolerance, so that a tight limit can be met.
    return bound - used + 1e-13 * used


def _advanced(position: Longs, edges: Steps, taken: Longs) -> Longs:
    """Move every row to the end of its last taken step."""
    result = position.copy()
    np.maximum.at(result, edges.row[taken], edges.end[taken])
    return result


def _filled(base: Longs, edges: Steps, left: Longs, room: float) -> tuple[Longs, float]:
    """Take later steps that still fit; return the positions and the cost saved."""
    result, saved = base.copy(), 0.0
    for step in left[:_FILL].tolist():
        row, weight = edges.row[step], float(edges.weight[step])
        if weight <= room and result[row] == edges.start[step]:
            result[row] = edges.end[step]
            room -= weight
            saved += float(edges.gain[step]) * weight
    return result, saved


def _moved(base: Longs, best: Longs, better: Improvement) -> Longs:
    if better.moves is None:
        return best
    result = base.copy()
    for row, position in better.moves:
        result[row] = position
    return result
