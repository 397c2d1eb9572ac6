"""The Lagrangian dual of several limits, by cutting planes (Kelley 1960).

The dual has one variable a limit, however many units there are: each evaluation is one pass over
the options, and the master is a linear program with a handful of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitknap.allocation.arrays import Floats, Longs

# In units of total cost range over total weight range, where the average step is 1.
_BOX = (1e2, 1e5, 1e9)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Point:
    """One evaluation of the dual.

    Attributes:
        multipliers: float64[M], at least 0.
        value: no plan within the limits costs less.
        choice: the cheapest options under these multipliers, int[R].
        excess: weight above each bound, float64[M]; the slope of the dual here.
    """

    multipliers: Floats
    value: float
    choice: Longs
    excess: Floats


def evaluate(cost: Floats, weights: Floats, bounds: Floats, multipliers: Floats) -> Point:
    """Return the dual at `multipliers`; a valid bound for any that are not negative."""
    priced = cost + np.tensordot(multipliers, weights, axes=1)
    choice = priced.argmin(axis=1)
    rows = np.arange(len(cost))
    excess = weights[:, rows, choice].sum(axis=1) - bounds
    value = float(cost[rows, choice].sum()) + float(multipliers @ excess)
    return Point(multipliers=multipliers, value=value, choice=choice, excess=excess)


def maximise(cost: Floats, weights: Floats, bounds: Floats, *, rounds: int = 200) -> Point:
    """Return the best dual point found.

    Args:
        cost: float64[R,F], +inf forbids.
        weights: float64[M,R,F], any sign.
        bounds: float64[M].
        rounds: at most so many evaluations; fewer are needed for few limits.
    """
    allowed = np.isfinite(cost)
    low, high = np.where(allowed, cost, np.inf).min(1), np.where(allowed, cost, -np.inf).max(1)
    worst = float(high.sum())
    cost_range = float((high - low).sum()) or 1.0
    spans = np.where(allowed, weights, -np.inf).max(2) - np.where(allowed, weights, np.inf).min(2)
    unit = cost_range / _or_one(spans.sum(axis=1))
    best = evaluate(cost, weights, bounds, np.zeros(len(bounds)))
    points = [best]
    box, scale = iter(_BOX), cost_range
    limit = next(box)
    for _ in range(rounds):
        step, promised = _master(points, best, unit, limit, scale)
        if promised <= 1e-12 * scale or promised <= 1e-13 * abs(best.value):
            limit = next(box, 0.0)
            at_edge = (best.multipliers >= 0.99 * limit * unit).any() if limit else False
            if not at_edge:
                break
            continue
        point = evaluate(cost, weights, bounds, step)
        points.append(point)
        # The master is solved to about 1e-7: measure it in what is left to gain.
        scale = max(min(scale, promised), 1e-14 * cost_range)
        if point.value > best.value:
            best = point
        if best.value > worst:
            break
    return best


def _or_one(scales: Floats) -> Floats:
    return np.where(scales > 0, scales, 1.0)


def _master(
    points: list[Point], best: Point, unit: Floats, limit: float, scale: float
) -> tuple[Floats, float]:
    """Maximise the cuts over the box; where, and how much above the best value they promise."""
    from scipy.optimize import linprog

    slopes = np.array([-point.excess * unit for point in points]) / scale
    heights = np.array(
        [p.value + p.excess @ (best.multipliers - p.multipliers) - best.value for p in points]
    )
    matrix = np.column_stack([np.ones(len(points)), slopes])
    center = best.multipliers / unit
    objective = np.zeros(matrix.shape[1])
    objective[0] = -1
    boxes = [(0, None), *((-c, limit - c) for c in center)]
    result = linprog(objective, A_ub=matrix, b_ub=heights / scale, bounds=boxes, method="highs")
    if result.x is None:
        return best.multipliers, 0.0
    return np.maximum((center + result.x[1:]) * unit, 0), float(result.x[0]) * scale
