"""The exact pass: dynamic programming over the few rows that could close the gap.

Costs are measured from the Lagrangian optimum. There each option of a row has a *reduced cost*
r >= 0, and the cost of a plan is exactly dual value + sum of r + multiplier x unused room.
Deviations from the base plan whose r reaches the known gap are excluded. The rest are added row by
row, nearest to the break first, keeping only undominated states (Pisinger 1995, "A minimal
algorithm for the multiple-choice knapsack problem"). A state is dropped when even the most
efficient remaining rows cannot make it cheaper than the best known plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Floats, Ints, Longs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Core:
    """The deviations that could improve on the base plan, grouped by row, best rows first.

    Attributes:
        row: row of each deviation, int[D].
        option: position that each deviation moves its row to, int[D].
        weight: weight added to the base plan, float64[D], any sign but 0.
        cost: cost added to the base plan, float64[D], any sign.
        reduced: reduced cost, float64[D], at least 0.
        first: index in the columns above where each core row begins, int[K+1].
        up: least reduced cost per weight added by this or any later row, float64[K+1].
        down: least reduced cost per weight removed, likewise, float64[K+1].
        room: weight that the base plan leaves unused, at least 0.
        multiplier: cost of one unit of weight at the Lagrangian optimum.
    """

    row: Longs
    option: Longs
    weight: Floats
    cost: Floats
    reduced: Floats
    first: Longs
    up: Floats
    down: Floats
    room: float
    multiplier: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Improvement:
    """The result of the exact pass.

    Attributes:
        moves: (row, position) changes to the base plan, or None to keep the known plan.
        above: the dual value plus this is a lower bound on the cost of every plan.
        gap: cost of the best known plan above the dual value.
    """

    moves: tuple[tuple[int, int], ...] | None
    above: float
    gap: float


def collect(
    cost: Floats,
    weight: Floats,
    base: Longs,
    *,
    multiplier: float,
    room: float,
    gap: float,
) -> Core:
    """Return the deviations with a reduced cost below `gap`.

    Args:
        cost: float64[F,R], +inf where pruned.
        weight: float64[F,R].
        base: position of each row in the base plan, int[R]; minimises cost + multiplier x weight.
        multiplier: the Lagrangian multiplier.
        room: weight that the base plan leaves unused.
        gap: cost of the best known plan above the dual value.
    """
    rows = np.arange(cost.shape[1])
    added_cost = cost - cost[base, rows]
    added_weight = weight - weight[base, rows]
    reduced = np.maximum(added_cost + multiplier * added_weight, 0)
    near = reduced < gap
    near[base, rows] = False
    row, option = np.nonzero(near.T)
    reduced = reduced[option, row]
    moved = added_weight[option, row]
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = reduced / np.abs(moved)
    best = np.full(cost.shape[1], np.inf)
    np.minimum.at(best, row, rate)
    order = np.lexsort((row, best[row]))
    row, option, moved, rate = row[order], option[order], moved[order], rate[order]
    first = np.flatnonzero(np.diff(row, prepend=-1, append=-1))
    up = _least_left(np.where(moved > 0, rate, np.inf), first)
    return Core(
        row=row,
        option=option,
        weight=moved,
        cost=added_cost[option, row],
        reduced=reduced[order],
        first=first,
        up=np.minimum(up, multiplier),
        down=_least_left(np.where(moved < 0, rate, np.inf), first),
        room=room,
        multiplier=multiplier,
    )


def _least_left(rate: Floats, first: Longs) -> Floats:
    """Return the least rate in this or any later row, with inf after the last, float64[K+1]."""
    least = np.full(len(first), np.inf)
    if len(first) > 1:
        each = np.minimum.reduceat(rate, first[:-1])
        least[:-1] = np.minimum.accumulate(each[::-1])[::-1]
    return least


def improve(core: Core, *, gap: float, enough: float, states: int, effort: int) -> Improvement:
    """Search the core for a plan better than the one `gap` above the dual value.

    Args:
        core: the deviations.
        gap: cost of the best known plan above the dual value.
        enough: ignore improvements of this size or less.
        states: most states to keep after a row; the bound stays valid.
        effort: stop after this many states in all.
    """
    weight, cost = np.zeros(1), np.zeros(1)
    history: list[_Layer] = []
    moves: tuple[tuple[int, int], ...] | None = None
    above, spent = np.inf, 0
    least = np.minimum.reduceat(core.reduced, core.first[:-1]).tolist() if len(core.row) else []
    for number, nearest in enumerate(least):
        if nearest >= gap:
            continue
        fresh = np.arange(core.first[number], core.first[number + 1])
        fresh = fresh[core.reduced[fresh] < gap]
        # Each row has a fixed cost of about a hundred states.
        spent += len(weight) * (len(fresh) + 1) + 100
        if spent > effort:
            above = min(above, float(_floor(core, number, weight, cost).min()))
            break
        weight, cost, layer = _extended(weight, cost, core.weight[fresh], core.cost[fresh])
        layer = replace(layer, moves=fresh)
        total = np.where(weight <= core.room, cost + core.multiplier * core.room, np.inf)
        best = int(total.argmin())
        if total[best] < gap:
            gap = float(total[best])
            moves = _traced(core, [*history, layer], best)
        floor = _floor(core, number + 1, weight, cost)
        live = floor < gap - enough
        if np.count_nonzero(live) > states:
            limit = float(np.partition(floor[live], states)[states])
            live &= floor < limit
            above = min(above, limit)
        weight, cost = weight[live], cost[live]
        if not len(weight):
            break
        history.append(replace(layer, parent=layer.parent[live], move=layer.move[live]))
    return Improvement(moves=moves, above=max(min(above, gap - enough), 0.0), gap=gap)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """The origin of each state after one core row: its parent state and its move (-1: none)."""

    parent: Ints
    move: npt.NDArray[np.int16]
    moves: Longs


def _extended(
    weight: Floats, cost: Floats, added_weight: Floats, added_cost: Floats
) -> tuple[Floats, Floats, _Layer]:
    """Return the undominated states after one more row, by increasing weight."""
    count = len(weight)
    weights = np.concatenate([weight, (added_weight[:, None] + weight).ravel()])
    costs = np.concatenate([cost, (added_cost[:, None] + cost).ravel()])
    # Timsort merges the runs, which are already sorted.
    order = np.argsort(weights, kind="stable")
    weights, costs = weights[order], costs[order]
    least = np.minimum.accumulate(costs)
    keep = np.ones(len(order), dtype=np.bool_)
    keep[1:] = costs[1:] < least[:-1]
    kept = np.flatnonzero(keep)
    # Among equal weights, the last state kept is the cheapest.
    kept = kept[np.diff(weights[kept], append=np.inf) > 0]
    move, parent = np.divmod(order[kept], count)
    empty = np.empty(0, dtype=np.int64)
    layer = _Layer(parent=parent.astype(np.int32), move=(move - 1).astype(np.int16), moves=empty)
    return weights[kept], costs[kept], layer


def _floor(core: Core, number: int, weight: Floats, cost: Floats) -> Floats:
    """Return the least cost of a state above the dual value, with rows from `number` on left."""
    missing = core.room - weight
    rate = np.where(missing >= 0, core.up[number], core.down[number])
    with np.errstate(invalid="ignore"):
        rest = np.where(missing == 0, 0, rate * np.abs(missing))
    floor: Floats = np.maximum(cost + core.multiplier * weight, 0) + rest
    return floor


def _traced(core: Core, history: list[_Layer], state: int) -> tuple[tuple[int, int], ...]:
    """Trace one state back to the base plan; return (row, position) of every move."""
    moves: list[tuple[int, int]] = []
    for layer in reversed(history):
        move = int(layer.move[state])
        if move >= 0:
            deviation = layer.moves[move]
            moves.append((int(core.row[deviation]), int(core.option[deviation])))
        state = int(layer.parent[state])
    return tuple(moves)
