"""Prune each row to the options that can matter, and find its lower convex hull.

All arrays are option-major, [F,R], so that every step is one long contiguous operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Bools, Floats, Longs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Options:
    """The options of each row by increasing weight.

    Attributes:
        option: column of the problem that each entry came from, int[F,R].
        cost: float64[F,R]; +inf where an option is forbidden or dominated.
        weight: float64[F,R].
        hull: whether an option lies on the lower convex hull of its row, bool[F,R].
    """

    option: npt.NDArray[np.intp]
    cost: Floats
    weight: Floats
    hull: Bools


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Steps:
    """The hull edges of all rows: each makes one row heavier and cheaper.

    Attributes:
        row: int[S].
        start: position in `Options` of the lighter end, int[S].
        end: position of the heavier end, int[S].
        gain: cost saved per unit of weight, float64[S], above 0, falling along a row.
        weight: weight added, float64[S], above 0.
    """

    row: Longs
    start: Longs
    end: Longs
    gain: Floats
    weight: Floats


def fitting(cost: Floats, weight: Floats, bound: float) -> Floats:
    """Forbid options that exceed the bound even when all other rows weigh least; float64[R,F].

    This saves work, and keeps costs that no plan can have out of the arithmetic.
    """
    light = np.where(np.isfinite(cost), weight, np.inf).min(axis=1)
    # Options that exceed the room only by rounding are kept.
    room = bound - light.sum() + 1e-9 * max(abs(bound), float(np.abs(light).sum()))
    return np.where(weight - light[:, None] > max(room, 0.0), np.inf, cost)


def options(cost: Floats, weight: Floats) -> Options:
    """Sort, drop dominated options (no lighter, no cheaper), and mark the hull.

    Args:
        cost: float64[R,F], +inf forbids.
        weight: float64[R,F], at least 0.
    """
    costs, weights = np.ascontiguousarray(cost.T), np.ascontiguousarray(weight.T)
    order = np.broadcast_to(np.arange(len(costs))[:, None], costs.shape)
    if not (weights[1:] > weights[:-1]).all():
        by_cost = np.argsort(costs, axis=0, kind="stable")
        by_weight = np.argsort(np.take_along_axis(weights, by_cost, 0), axis=0, kind="stable")
        order = np.take_along_axis(by_cost, by_weight, 0)
        costs = np.take_along_axis(costs, order, 0)
        weights = np.take_along_axis(weights, order, 0)
    least = np.minimum.accumulate(costs, axis=0)
    dominated = np.zeros(costs.shape, dtype=np.bool_)
    dominated[1:] = costs[1:] >= least[:-1]
    costs = np.where(dominated, np.inf, costs)
    return Options(option=order, cost=costs, weight=weights, hull=_hull(costs, weights))


def _hull(cost: Floats, weight: Floats) -> Bools:
    """Mark options whose steepest descent from the left beats every descent to the right.

    A forbidden option has infinite slopes that never win; NaN only meets another forbidden one.
    """
    falling_in = np.full(cost.shape, -np.inf)
    falling_out = np.full(cost.shape, np.inf)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for left in range(len(cost)):
            for right in range(left + 1, len(cost)):
                slope = (cost[right] - cost[left]) / (weight[right] - weight[left])
                np.maximum(falling_in[right], slope, out=falling_in[right])
                np.minimum(falling_out[left], slope, out=falling_out[left])
        inside: Bools = (falling_in < falling_out) & np.isfinite(cost)
    # Slopes that overflow compare as equal, but the lightest option is on every hull.
    inside[np.isfinite(cost).argmax(axis=0), np.arange(cost.shape[1])] = True
    return inside


def steps(pruned: Options) -> Steps:
    """Return the hull edges, in no particular order."""
    count, rows = pruned.cost.shape
    last = np.full(rows, -1)
    parts: list[tuple[Longs, Longs, Longs, Floats, Floats]] = []
    last_cost, last_weight = np.zeros(rows), np.zeros(rows)
    for position in range(count):
        here = np.flatnonzero(pruned.hull[position])
        row = here[last[here] >= 0]
        saved = last_cost[row] - pruned.cost[position, row]
        added = pruned.weight[position, row] - last_weight[row]
        parts.append((row, last[row], np.full(len(row), position), saved, added))
        last[here] = position
        last_cost[here] = pruned.cost[position, here]
        last_weight[here] = pruned.weight[position, here]
    row, start, end, saved, added = (np.concatenate(part) for part in zip(*parts, strict=True))
    with np.errstate(over="ignore"):
        gain = saved / added
    return Steps(row=row, start=start, end=end, gain=gain, weight=added)


def split(edges: Steps, room: float, *, sort: int = 4096) -> tuple[Longs, Longs]:
    """Return the most rewarding steps that fit into `room` together, and some of the next ones.

    The first step that does not fit is the first of the second array, which is empty if all fit.
    This is a weighted selection instead of a full sort: only about `sort` steps around the break
    are sorted, by reward and then by index, so that the result does not depend on the sorting
    algorithm.
    """
    near = np.arange(len(edges.gain))
    taken: list[Longs] = []
    while len(near) > sort:
        gain = edges.gain[near]
        better = gain > np.median(gain[:: len(gain) // 1000 or 1])
        weight = float(edges.weight[near[better]].sum())
        if not better.any() or (weight <= room and better.all()):
            break
        if weight > room:
            near = near[better]
        else:
            room -= weight
            taken.append(near[better])
            near = near[~better]
    near = near[np.argsort(-edges.gain[near], kind="stable")]
    fits = int(np.searchsorted(np.cumsum(edges.weight[near]), room, side="right"))
    return np.concatenate([*taken, near[:fits]]), near[fits:]


def common_divisor(pruned: Options) -> float:
    """Return the largest d such that all plans' weights differ by multiples of d; 0 if unknown.

    Only sums of whole numbers are exact; for other weights the divisor is unknown.
    """
    allowed = np.isfinite(pruned.cost)
    difference = (pruned.weight - pruned.weight[0])[allowed]
    difference = difference[difference != 0]
    if not difference.size or (pruned.weight != np.floor(pruned.weight))[allowed].any():
        return 0.0
    if np.abs(difference).max() >= 2**53:
        return 0.0
    whole = difference.astype(np.int64)
    # A sample is often enough to see that the divisor is 1.
    if int(np.gcd.reduce(whole[:: max(1, len(whole) // 1000)])) == 1:
        return 1.0
    return float(np.gcd.reduce(whole))
