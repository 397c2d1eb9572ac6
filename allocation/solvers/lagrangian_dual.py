"""The Lagrangian dual of several limits, by column generation.

The dual has one multiplier per limit, however many units there are. A linear program over a sample
of the rows comes close to its optimum; one over all rows and the options that are nearly the
cheapest under those multipliers is exact, since every other option is priced out (Dantzig and Wolfe
1960).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bitknap.allocation.problem.arrays import Bools, Floats, Longs
from bitknap.allocation.solvers.lower_hulls import options, split, steps

# Number of options in the linear programs: of the sample, and near the cheapest over all rows.
_SAMPLED, _NEAR = 8_000, 12_000
# Largest multipliers, relative to total cost range over total weight range.
_BOXES = (1e4, 1e9)
_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Point:
    """One evaluation of the dual.

    Attributes:
        multipliers: float64[M], at least 0.
        value: the dual value, a lower bound on the cost of every plan within the limits.
        choice: the cheapest options under these multipliers, int[R].
    """

    multipliers: Floats
    value: float
    choice: Longs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    """Rows with their options and the limits on them.

    Attributes:
        cost: float64[R,F].
        weights: float64[M,R,F].
        bounds: float64[M].
        unit: scale of each multiplier, float64[M].
        worst: upper bound on the cost of any plan.
    """

    cost: Floats
    weights: Floats
    bounds: Floats
    unit: Floats
    worst: float


def evaluate(cost: Floats, weights: Floats, bounds: Floats, multipliers: Floats) -> Point:
    """Return the dual at `multipliers`; a valid bound for any that are not negative."""
    priced = cost + np.tensordot(multipliers, weights, axes=1)
    choice = priced.argmin(axis=1)
    rows = np.arange(len(cost))
    excess = weights[:, rows, choice].sum(axis=1) - bounds
    value = float(cost[rows, choice].sum()) + float(multipliers @ excess)
    return Point(multipliers=multipliers, value=value, choice=choice)


def reduced(cost: Floats, weights: Floats, point: Point) -> Floats:
    """Return the reduced cost of each option, its excess over its row's cheapest, float64[R,F]."""
    priced = cost + np.tensordot(point.multipliers, weights, axes=1)
    least = priced[np.arange(len(cost)), point.choice]
    result: Floats = np.maximum(priced - least[:, None], 0)
    return result


def maximise(cost: Floats, weights: Floats, bounds: Floats) -> Point:
    """Return the best dual point found, within about 1e-9 of the optimum unless rounds run out.

    Args:
        cost: float64[R,F], +inf forbids.
        weights: float64[M,R,F], any sign.
        bounds: float64[M].
    """
    if len(bounds) == 1 and (point := _sorted(cost, weights, bounds)):
        return point
    allowed = np.isfinite(cost)
    low, high = np.where(allowed, cost, np.inf).min(1), np.where(allowed, cost, -np.inf).max(1)
    cost_range = float((high - low).sum()) or 1.0
    light = np.where(allowed, weights, np.inf).min(2)
    span = np.where(allowed, weights, -np.inf).max(2) - light
    unit = cost_range / _or_one(span.sum(axis=1))
    worst = float(high.sum())
    rows = _Rows(cost=cost, weights=weights, bounds=bounds, unit=unit, worst=worst)
    best = evaluate(cost, weights, bounds, np.zeros(len(bounds)))
    for box in _BOXES:
        best = _generated(rows, _sampled(rows, light, span, best, box), box)
        if best.value > worst or (best.multipliers < 0.99 * box * unit).all():
            break
    return best


def _sorted(cost: Floats, weights: Floats, bounds: Floats) -> Point | None:
    """Return the optimum for one limit by sorting; None if slopes overflow floats."""
    pruned = options(cost, weights[0])
    edges = steps(pruned)
    lightest = np.argmax(pruned.hull, axis=0)
    room = bounds[0] - pruned.weight[lightest, np.arange(len(cost))].sum()
    if room < 0 or not np.isfinite(edges.gain).all():
        return None
    left = split(edges, float(room))[1]
    multiplier = float(edges.gain[left[0]]) if len(left) else 0.0
    return evaluate(cost, weights, bounds, np.array([multiplier]))


def _sampled(rows: _Rows, light: Floats, span: Floats, best: Point, box: float) -> Point:
    """Return the dual point of an even sample of rows, with bounds scaled to it, if better."""
    count, width = rows.cost.shape
    wanted = max(_SAMPLED // width, 100)
    if count <= wanted:
        return best
    # A golden-ratio sequence: even over layers, experts and projections whatever their order.
    picked = np.argsort((np.arange(count) * 0.6180339887498949) % 1.0, kind="stable")[:wanted]
    share = (rows.bounds - light.sum(axis=1)) / _or_one(span.sum(axis=1))
    bounds = light[:, picked].sum(axis=1) + share * span[:, picked].sum(axis=1)
    sample = replace(rows, cost=rows.cost[picked], weights=rows.weights[:, picked], bounds=bounds)
    solution = _program(sample, sample.cost.argmin(axis=1), np.isfinite(sample.cost), box)
    if solution is None:
        return best
    point = evaluate(rows.cost, rows.weights, rows.bounds, solution[0])
    return point if point.value > best.value else best


def _generated(rows: _Rows, best: Point, box: float) -> Point:
    """Solve over more and more relevant options until none of the others matters."""
    every = np.arange(len(rows.cost))
    columns = np.zeros(rows.cost.shape, dtype=np.bool_)
    for _ in range(_ROUNDS):
        left = reduced(rows.cost, rows.weights, best)
        finite = left[np.isfinite(left)]
        size = _NEAR + len(every)
        cut = np.partition(finite, size)[size] if size < len(finite) else np.inf
        columns |= left < cut
        columns[every, best.choice] = True
        solution = _program(rows, best.choice, columns & np.isfinite(rows.cost), box)
        if solution is None:
            break
        multipliers, promised = solution
        point = evaluate(rows.cost, rows.weights, rows.bounds, multipliers)
        columns[every, point.choice] = True
        if point.value > best.value:
            best = point
        if promised - best.value <= 1e-9 * abs(promised) or best.value > rows.worst:
            break
    return best


def _program(rows: _Rows, base: Longs, columns: Bools, box: float) -> tuple[Floats, float] | None:
    """Solve the linear relaxation over some options; return multipliers in the box and its value.

    Excess over a limit is paid for at the price of the box, so that a solution always exists.
    Returns None when all rows are left with one option, or when numbers overflow floats.
    """
    from scipy.optimize import linprog
    from scipy.sparse import block_array, csr_array, eye_array

    each, height = np.arange(len(rows.cost)), len(rows.bounds)
    others = columns.copy()
    others[each, base] = False
    row, option = np.nonzero(others)
    if not len(row):
        return None
    added = rows.cost[row, option] - rows.cost[row, base[row]]
    moved = rows.weights[:, row, option] - rows.weights[:, row, base[row]]
    room = rows.bounds - rows.weights[:, each, base].sum(axis=1)
    cost_scale = float(np.abs(added).max()) or 1.0
    scale = cost_scale / rows.unit
    number = np.unique(row, return_inverse=True)[1]
    one_a_row = csr_array((np.ones(len(row)), (number, np.arange(len(row)))))
    matrix = block_array(
        [[one_a_row, None], [csr_array(moved / scale[:, None]), -eye_array(height)]], format="csr"
    )
    result = linprog(
        np.concatenate([added / cost_scale, np.full(height, box)]),
        A_ub=matrix,
        b_ub=np.concatenate([np.ones(number.max() + 1), room / scale]),
        method="highs",
    )
    if result.x is None:
        return None
    multipliers = np.maximum(-result.ineqlin.marginals[-height:], 0) * rows.unit
    base_cost = float(rows.cost[each, base].sum())
    return multipliers, base_cost + float(result.fun) * cost_scale


def _or_one(scales: Floats) -> Floats:
    return np.where(scales > 0, scales, 1.0)
