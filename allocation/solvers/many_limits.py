"""Several limits, or weights of any sign: dual multipliers, then an integer solver on a core."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from bitknap.allocation.plans.solution import Answer, Status
from bitknap.allocation.problem.arrays import Bools, Floats, Longs
from bitknap.allocation.solvers.integer_program import TOLERANCE, Program, Runner
from bitknap.allocation.solvers.lagrangian_dual import Point, maximise, reduced
from bitknap.allocation.solvers.lower_hulls import fitting

# Initial size of the core, in deviations from the dual optimum; grows while the gap requires it.
_CORE = 2000
# Largest core: on larger ones, integer solvers no longer keep to their time limits.
_LARGEST = 30_000
# Relative gap that counts as 0, since solvers use floats with absolute tolerances.
_PROVEN = 1e-9
# Largest coefficients given to the integer solver, whose tolerances are absolute.
_COST_SCALE, _WEIGHT_SCALE = 1e6, 1e5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Task:
    """The whole problem, and how to solve a core of it."""

    cost: Floats
    weights: Floats
    bounds: Floats
    run: Runner
    gap: float
    deadline: float

    def value(self, choice: Longs) -> float:
        return float(self.cost[np.arange(len(self.cost)), choice].sum())

    def fits(self, choice: Longs) -> bool:
        used = self.weights[:, np.arange(len(choice)), choice]
        # A tenth of the final check's tolerance.
        return bool((used.sum(axis=1) <= self.bounds + 1e-13 * np.abs(used).sum(axis=1)).all())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Solved:
    """The result for one core: a choice or none, a bound, and whether the solver finished."""

    choice: Longs | None
    bound: float
    finished: bool


def answer(
    cost: Floats,
    weights: Floats,
    bounds: Floats,
    run: Runner,
    *,
    gap: float,
    time_limit: float,
    start: Longs | None = None,
) -> Answer:
    """Return the best choice found and a valid bound.

    Args:
        cost: float64[R,F], +inf forbids.
        weights: float64[M,R,F], any sign.
        bounds: finite float64[M], at least one.
        run: solver of the integer programs of the cores.
        gap: relative gap at which to stop.
        time_limit: seconds for all cores together.
        start: a choice within the limits, int[R]; the first core then holds all options that could
            improve it.
    """
    deadline = time.monotonic() + time_limit
    for weight, bound in zip(weights, bounds.tolist(), strict=True):
        cost = fitting(cost, weight, bound)
    task = _Task(cost=cost, weights=weights, bounds=bounds, run=run, gap=gap, deadline=deadline)
    dual = maximise(cost, weights, bounds)
    most = np.where(np.isfinite(cost), cost, -np.inf).max(axis=1)
    if dual.value > most.sum() + 1e-9 * np.abs(most).sum():
        return Answer(choice=None, bound=np.inf, status=Status.INFEASIBLE)
    return _by_cores(task, dual, start if start is not None and task.fits(start) else None)


def _by_cores(task: _Task, dual: Point, start: Longs | None) -> Answer:
    """Solve larger and larger cores around the dual optimum, until one proves its best choice.

    Args:
        task: the whole problem.
        dual: its dual optimum.
        start: a choice within the limits, if one is known.
    """
    above = reduced(task.cost, task.weights, dual)
    ranked = np.sort(above[np.isfinite(above) & (above > 0)])
    base, best = dual.choice, None
    size, ceiling = _CORE, np.inf
    if start is not None:
        base, best = start, (task.value(start), start)
        ceiling = best[0] - dual.value
        size = min(_enough(ranked, ceiling), _LARGEST)
    while True:
        # Plans outside the core cost at least `cut` above the dual value, or more than a known
        # plan.
        cut = float(ranked[size]) if size < len(ranked) else np.inf
        core = (above < cut) & (above <= ceiling)
        core[np.arange(len(task.cost)), base] = True
        solved = _solved(task, core, base)
        bound = max(dual.value, min(solved.bound, dual.value + cut))
        stop = time.monotonic() > task.deadline or size >= _LARGEST
        if solved.choice is None and best is None:
            if solved.finished and np.isinf(cut):
                return Answer(choice=None, bound=np.inf, status=Status.INFEASIBLE)
            if stop:
                return Answer(choice=None, bound=bound, status=Status.FEASIBLE)
            size *= 8
            continue
        if solved.choice is not None and (best is None or task.value(solved.choice) < best[0]):
            best = task.value(solved.choice), solved.choice
        # Within the limits, so that the next core starts from a plan.
        value, base = best  # type: ignore[misc]
        bound = min(bound, value)
        open_gap = value - bound > max(task.gap, _PROVEN) * abs(value)
        closer = value - dual.value
        if open_gap and not stop and solved.finished:
            if closer > cut:
                size = min(_enough(ranked, closer), _LARGEST)
                continue
            if (core & (above > closer)).any():
                # Dropping options that no better plan uses gives the solver a finer scale.
                ceiling = closer
                continue
        proven = solved.finished and value - bound <= _PROVEN * abs(value)
        status = Status.OPTIMAL if proven else Status.FEASIBLE
        return Answer(choice=base, bound=bound, status=status)


def _enough(ranked: Floats, gap: float) -> int:
    """Return the size of the core that holds every plan up to `gap` above the dual value."""
    return int(np.searchsorted(ranked, gap, side="right")) + 1


def _solved(task: _Task, core: Bools, base: Longs) -> _Solved:
    """Solve the rows with several options left; the others stay at `base`."""
    cost, weights = task.cost, task.weights
    rows = np.arange(len(cost))
    row, option = np.nonzero(core & (core.sum(axis=1) > 1)[:, None])
    least = task.value(base)
    if not len(row):
        fits = task.fits(base)
        return _Solved(
            choice=base if fits else None, bound=least if fits else np.inf, finished=True
        )
    moved = weights[:, row, option] - weights[:, row, base[row]]
    room = task.bounds - weights[:, rows, base].sum(axis=1)
    largest = np.abs(moved).max(axis=1)
    scales = _WEIGHT_SCALE / np.where(largest > 0, largest, 1.0)
    added = cost[row, option] - cost[row, base[row]]
    cost_scale = _COST_SCALE / (np.abs(added).max() or 1.0)
    number = np.unique(row, return_inverse=True)[1]
    enough = task.gap * abs(least) * cost_scale
    bound = np.inf
    for _ in range(5):
        program = Program(
            cost=added * cost_scale,
            row=number,
            weights=moved * scales[:, None],
            bounds=room * scales,
            start=option == base[row],
        )
        result = task.run(program, enough, max(task.deadline - time.monotonic(), 0.1))
        if result.picked is None:
            if np.isinf(bound):
                # Either the core is proven to have no plan, or nothing is known about it.
                least_there = np.inf if result.finished else -np.inf
                return _Solved(choice=None, bound=least_there, finished=result.finished)
            # Infeasible only under the limits as tightened below.
            return _Solved(choice=None, bound=bound, finished=False)
        if np.isinf(bound):
            bound = least + (result.bound - TOLERANCE) / cost_scale
        choice = base.copy()
        choice[row[result.picked]] = option[result.picked]
        if task.fits(choice):
            return _Solved(choice=choice, bound=bound, finished=result.finished)
        # The integer solver may exceed a limit slightly: tighten the limit by that excess.
        over = weights[:, rows, choice].sum(axis=1) - task.bounds
        room = room - np.where(over > 0, 2 * over + TOLERANCE / scales, 0)
    return _Solved(choice=None, bound=bound, finished=False)
