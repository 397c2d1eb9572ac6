"""The Lagrangian path: every hull step of every row, by falling gain per unit of weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitknap.allocation.problem.arrays import Floats, Ints, Longs
from bitknap.allocation.solvers.lower_hulls import Options, options, steps
from bitknap.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Path:
    """The plans that are optimal for some price of weight, each one step from the next.

    Attributes:
        start: option of each row in the lightest plan, int[R].
        row: row that each step moves, int[S].
        option: option that the row takes, int[S].
        gain: cost saved per unit of weight, float64[S], above 0, never rising.
        weight: weight of the plan after 0, 1, … S steps, float64[S+1].
        cost: cost of that plan, float64[S+1].
    """

    start: Longs
    row: Longs
    option: Longs
    gain: Floats
    weight: Floats
    cost: Floats

    def choice(self, count: int) -> Longs:
        """Return the option of each row after `count` steps, int[R]."""
        return taken(self.start, self.row[:count], self.option[:count])


def taken(start: Ints | Longs, row: Ints | Longs, option: Ints | Longs) -> Longs:
    """Return the option of each row after taking steps in this order, int[R]."""
    last = np.full(len(start), -1)
    np.maximum.at(last, row, np.arange(len(row)))
    result = start.astype(np.int64)
    moved = last >= 0
    result[moved] = option[last[moved]]
    return result


def lagrangian_path(cost: Floats, weight: Floats) -> Path:
    """Return the whole path; equal gains keep the order of the columns, then of the rows.

    Args:
        cost: float64[R,F], +inf forbids.
        weight: float64[R,F], any sign: only differences within a row matter.

    Raises:
        InputError: a gain overflows floats.
    """
    pruned = options(cost, weight)
    edges = steps(pruned)
    # The lightest remaining option is on the hull, unless its slopes overflow.
    first = np.argmax(np.isfinite(pruned.cost), axis=0)
    rows = np.arange(len(first))
    if not (pruned.hull[first, rows].all() and np.isfinite(edges.gain).all()):
        raise InputError("limit: cost over weight is beyond floats; scale the weights or use Ilp")
    reached = pruned.option[edges.end, edges.row]
    order = np.argsort(-edges.gain, kind="stable")
    gain, added = edges.gain[order], edges.weight[order]
    return Path(
        start=pruned.option[first, rows],
        row=edges.row[order],
        option=reached[order],
        gain=gain,
        weight=_summed(float(pruned.weight[first, rows].sum()), added),
        # Summed from the cheap end: from the expensive end, rounding would swamp small steps.
        cost=_summed(_least(pruned), (gain * added)[::-1])[::-1],
    )


def _summed(first: float, parts: Floats) -> Floats:
    return first + np.concatenate([[0.0], np.cumsum(parts)])


def _least(pruned: Options) -> float:
    return float(pruned.cost.min(axis=0).sum())
