"""The greedy solver: best gain per unit of weight first, so that plans are nested."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bitknap.allocation.plans.solution import Answer, Status
from bitknap.allocation.problem.arrays import Floats, Longs, slack
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.solvers.lagrangian_dual import maximise
from bitknap.allocation.solvers.lagrangian_path import Path, lagrangian_path

# Steps examined together under several limits, to bound memory.
_CHUNK = 1 << 16
# Rounds over the path to meet the other limits; a second one is rarely needed.
_ROUNDS = 4
# Relative to a sum: a tenth of the final check's rounding tolerance.
_ROUNDING = 1e-13


@dataclass(frozen=True, slots=True)
class Greedy:
    """Marginal gain: take hull steps by cost saved per unit of weight, up to the first misfit.

    The budget is the first limit with a bound. Under a larger budget the plan only upgrades units
    of the plan for a smaller one: the order of the steps does not depend on the budget, and
    no later step is taken after the first that does not fit. That costs at most the gain of one
    step, and options off the hull are never chosen: use `Knapsack` where plans need not be nested.
    Kellerer, Pferschy and Pisinger (2004), section 11.2.1, call this MCKP-Greedy.

    Other limits are met first, regardless of the budget: steps that bring a broken limit closer are
    taken early, best gain first. After that, a step that would break another limit stops its row
    for good. This is a heuristic. It only upgrades along the budget's hulls, so it finds no plan
    where a limit requires other options, and its start may be heavier than the lightest plan within
    the limits; `Knapsack` and `Ilp` do better.

    The order considers the budget alone: where another limit is the tight one, expect a plan far
    from its bound. The bound is the Lagrangian dual of all limits. One limit is vectorised; with
    several, steps are taken in a Python loop, about 10 µs each.
    """

    @property
    def name(self) -> str:
        """Shown in solutions and messages."""
        return "greedy"

    def answer(self, problem: Problem) -> Answer:
        """Return the greedy plan, or none if it cannot meet the limits.

        Raises:
            InputError: cost over weight overflows floats.
        """
        finite = np.isfinite(problem.bounds)
        if not finite.any():
            cost = problem.cost
            bound = float(cost.min(axis=1).sum())
            return Answer(choice=cost.argmin(axis=1), bound=bound, status=Status.OPTIMAL)
        weights, bounds = problem.weights[finite], problem.bounds[finite]
        path = lagrangian_path(problem.cost, weights[0])
        if len(bounds) == 1:
            return _single(path, weights[0], float(bounds[0]))
        dual = maximise(problem.cost, weights, bounds)
        return Answer(
            choice=_several(path, weights, bounds), bound=dual.value, status=Status.FEASIBLE
        )


def _single(path: Path, weight: Floats, bound: float) -> Answer:
    # The running sum may be off by rounding: start from one step too many.
    most = bound + _ROUNDING * float(np.abs(path.weight).max())
    steps = int(np.searchsorted(path.weight, most, side="right")) - 1
    rows = np.arange(len(path.start))
    while steps >= 0:
        choice = path.choice(steps)
        used = weight[rows, choice]
        room = bound + 0.1 * slack(used) - float(used.sum())
        if room >= 0:
            value = float(path.cost[steps])
            if steps < len(path.row):
                value -= float(path.gain[steps]) * room
            return Answer(choice=choice, bound=value, status=Status.FEASIBLE)
        steps -= 1
    return Answer(choice=None, bound=np.inf, status=Status.INFEASIBLE)


def _several(path: Path, weights: Floats, bounds: Floats) -> Longs | None:
    """Return the options of each row; None if the start is not within the limits."""
    largest = np.abs(weights).max(axis=2).sum(axis=1)
    whole = (weights == np.floor(weights)).all(axis=(1, 2))
    most = bounds + np.where(whole, 0, _ROUNDING * largest)
    walk = _Walk(
        path=path,
        weights=weights,
        most=most.tolist(),
        scale=np.where(largest > 0, largest, 1.0).tolist(),
        at=path.start.astype(np.int64),
        reached=[-1] * len(path.start),
    )
    _repair(walk)
    used = _used(walk)
    if any(one > limit for one, limit in zip(used, walk.most, strict=True)):
        return None
    _upgrade(walk)
    return walk.at


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Walk:
    """The position of each row on the path; `at` and `reached` change in place.

    Attributes:
        path: the path.
        weights: float64[M,R,F], the budget's first.
        most: bound of each limit, including its rounding tolerance.
        scale: largest possible sum of each limit, to compare excess across limits.
        at: current option of each row, int[R].
        reached: last step taken by each row, -1 at the start.
    """

    path: Path
    weights: Floats
    most: list[float]
    scale: list[float]
    at: Longs
    reached: list[int]


def _used(walk: _Walk) -> list[float]:
    used: list[float] = walk.weights[:, np.arange(len(walk.at)), walk.at].sum(axis=1).tolist()
    return used


def _moves(walk: _Walk, first: int) -> Iterator[tuple[int, int, list[float]]]:
    """Yield each step of one chunk that is still ahead of its row: step, row, change per limit."""
    path = walk.path
    part = slice(first, first + _CHUNK)
    row, option = path.row[part], path.option[part]
    target = walk.weights[:, row, option].T
    now = dict(zip(row.tolist(), walk.weights[:, row, walk.at[row]].T.tolist(), strict=True))
    for step, (here, wanted) in enumerate(zip(row.tolist(), target.tolist(), strict=True), first):
        if walk.reached[here] < step:
            yield step, here, [new - old for new, old in zip(wanted, now[here], strict=True)]
            if walk.reached[here] == step:
                now[here] = wanted


def _take(walk: _Walk, step: int, row: int, used: list[float], change: list[float]) -> None:
    walk.at[row] = walk.path.option[step]
    walk.reached[row] = step
    used[:] = [old + more for old, more in zip(used, change, strict=True)]


def _repair(walk: _Walk) -> None:
    """Take the best steps that bring broken limits closer, ignoring the budget."""
    for _ in range(_ROUNDS):
        before = list(walk.reached)
        for first in range(0, len(walk.path.row), _CHUNK):
            used = _used(walk)
            excess = _excess(walk, used)
            for step, row, change in _moves(walk, first):
                if not excess:
                    return
                after = _excess(walk, [a + b for a, b in zip(used, change, strict=True)])
                if after < excess:
                    _take(walk, step, row, used, change)
                    excess = after
        if walk.reached == before:
            return


def _excess(walk: _Walk, used: list[float]) -> float:
    """Return the excess over limits other than the budget, as shares of their scales."""
    return sum(
        (one - most) / scale
        for one, most, scale in zip(used[1:], walk.most[1:], walk.scale[1:], strict=True)
        if one > most
    )


def _upgrade(walk: _Walk) -> None:
    """Take steps up to the first that breaks the budget; other limits only stop a row."""
    ended: set[int] = set()
    for first in range(0, len(walk.path.row), _CHUNK):
        # Summed afresh, so that rounding errors do not accumulate.
        used = _used(walk)
        for step, row, change in _moves(walk, first):
            if row in ended:
                continue
            fits = [
                one + more <= most for one, more, most in zip(used, change, walk.most, strict=True)
            ]
            if not all(fits[1:]):
                ended.add(row)
            elif not fits[0]:
                return
            else:
                _take(walk, step, row, used, change)
