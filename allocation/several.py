"""Several limits, or weights of any sign: dual multipliers, then HiGHS on the core alone."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from bitknap.allocation.arrays import Bools, Floats, Longs
from bitknap.allocation.dual import Point, maximise
from bitknap.allocation.highs import TOLERANCE, Program, run
from bitknap.allocation.problem import Problem
from bitknap.allocation.solution import Answer, Status

# First size of the core, in deviations from the dual optimum; grows as the gap demands.
_CORE = 1000
# Largest coefficients given to HiGHS, whose tolerances are absolute.
_COST_SCALE, _WEIGHT_SCALE = 1e6, 1e5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Found:
    """What HiGHS says of one core: a choice or none, a bound on the core, and if it finished."""

    choice: Longs | None
    bound: float
    finished: bool


def answer(problem: Problem, *, gap: float, time_limit: float) -> Answer:
    """Return the best choice found and a valid bound.

    Args:
        problem: any limits.
        gap: relative gap at which HiGHS may stop.
        time_limit: seconds for all cores together.
    """
    deadline = time.monotonic() + time_limit
    finite = np.isfinite(problem.bounds)
    weights, bounds = problem.weights[finite], problem.bounds[finite]
    cost = _pruned(problem.cost, weights)
    dual = maximise(cost, weights, bounds)
    dearest = np.where(np.isfinite(cost), cost, -np.inf).max(axis=1)
    if dual.value > dearest.sum() + 1e-9 * np.abs(dearest).sum():
        return Answer(choice=None, bound=np.inf, status=Status.INFEASIBLE)
    reduced = _reduced(cost, weights, dual)
    ranked = np.sort(reduced[np.isfinite(reduced) & (reduced > 0)])
    size = _CORE
    while True:
        # Every option left out costs at least `cut` above the dual value.
        cut = float(ranked[size]) if size < len(ranked) else np.inf
        core = np.isfinite(reduced) & (reduced < cut)
        core[np.arange(len(cost)), dual.choice] = True
        found = _highs(cost, weights, bounds, core, dual.choice, gap, deadline)
        bound = max(dual.value, min(found.bound, dual.value + cut))
        late = time.monotonic() > deadline
        if found.choice is None:
            if found.finished and np.isinf(cut):
                return Answer(choice=None, bound=np.inf, status=Status.INFEASIBLE)
            if late:
                return Answer(choice=None, bound=bound, status=Status.FEASIBLE)
            size *= 8
            continue
        value = float(cost[np.arange(len(cost)), found.choice].sum())
        if late or value <= dual.value + cut or not found.finished:
            proven = found.finished and value <= dual.value + cut and not gap
            status = Status.OPTIMAL if proven else Status.FEASIBLE
            return Answer(choice=found.choice, bound=min(bound, value), status=status)
        size = int(np.searchsorted(ranked, value - dual.value, side="right")) + 1


def clashing(problem: Problem) -> list[int]:
    """Return a smallest set of limits that cannot be met together; empty if all can."""
    allowed = np.isfinite(problem.cost)
    flat = np.where(allowed, 0.0, np.inf)
    left = [i for i in range(len(problem.bounds)) if np.isfinite(problem.bounds[i])]

    def reachable(limits: list[int]) -> bool:
        weights, bounds = problem.weights[limits], problem.bounds[limits]
        base = np.argmax(allowed, axis=1)
        deadline = time.monotonic() + 20
        return _highs(flat, weights, bounds, allowed, base, 0.0, deadline).choice is not None

    if reachable(left):
        return []
    for limit in list(left):
        without = [other for other in left if other != limit]
        if without and not reachable(without):
            left = without
    return left


def _pruned(cost: Floats, weights: Floats) -> Floats:
    """Forbid options that another one matches or beats in cost and in every weight."""
    result = cost.copy()
    for one in range(cost.shape[1]):
        for other in range(cost.shape[1]):
            if one != other:
                beats = (result[:, other] <= result[:, one]) & np.isfinite(result[:, other])
                beats &= (weights[:, :, other] <= weights[:, :, one]).all(axis=0)
                result[beats, one] = np.inf
    return result


def _reduced(cost: Floats, weights: Floats, dual: Point) -> Floats:
    priced = cost + np.tensordot(dual.multipliers, weights, axes=1)
    least = priced[np.arange(len(cost)), dual.choice]
    reduced: Floats = np.maximum(priced - least[:, None], 0)
    return reduced


def _highs(
    cost: Floats,
    weights: Floats,
    bounds: Floats,
    core: Bools,
    base: Longs,
    gap: float,
    deadline: float,
) -> _Found:
    """Solve the rows with several options left; all others stay at `base`."""
    rows = np.arange(len(cost))
    row, option = np.nonzero(core & (core.sum(axis=1) > 1)[:, None])
    least = float(cost[rows, base].sum())
    if not len(row):
        fits = _fits(weights, bounds, base)
        return _Found(choice=base if fits else None, bound=least if fits else np.inf, finished=True)
    moved = weights[:, row, option] - weights[:, row, base[row]]
    room = bounds - weights[:, rows, base].sum(axis=1)
    largest = np.abs(moved).max(axis=1)
    scales = _WEIGHT_SCALE / np.where(largest > 0, largest, 1.0)
    added = cost[row, option] - cost[row, base[row]]
    cost_scale = _COST_SCALE / (np.abs(added).max() or 1.0)
    number = np.unique(row, return_inverse=True)[1]
    bound = np.inf
    for _ in range(5):
        program = Program(
            cost=added * cost_scale,
            row=number,
            weights=moved * scales[:, None],
            bounds=room * scales,
        )
        result = run(program, gap=gap, seconds=max(deadline - time.monotonic(), 0.1))
        if result.picked is None:
            return _Found(choice=None, bound=bound, finished=result.finished)
        if np.isinf(bound):
            bound = least + (result.bound - TOLERANCE) / cost_scale
        choice = base.copy()
        choice[row[result.picked]] = option[result.picked]
        if _fits(weights, bounds, choice):
            return _Found(choice=choice, bound=bound, finished=result.finished)
        # HiGHS may allow a little too much: ask for that much less.
        over = weights[:, rows, choice].sum(axis=1) - bounds
        room = room - np.where(over > 0, 2 * over + TOLERANCE / scales, 0)
    return _Found(choice=None, bound=bound, finished=False)


def _fits(weights: Floats, bounds: Floats, choice: Longs) -> bool:
    used = weights[:, np.arange(len(choice)), choice]
    # A tenth of what the final check allows.
    return bool((used.sum(axis=1) <= bounds + 1e-13 * np.abs(used).sum(axis=1)).all())
