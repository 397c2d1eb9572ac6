"""Rounding errors of a sample of rows, for costs that are sums over rows, with standard errors.

Rows are drawn for each unit by itself, from the seed and the unit's name. What a row costs in a
format is nearly proportional to its size, what it would cost to lose the row altogether, and sizes
are known for all rows. So a unit's cost is estimated as the size of all its rows × the ratio of
cost to size in the sample (the ratio estimator; Cochran, Sampling Techniques, 1977, chapter 6).
All formats are rounded on the same rows: their differences are known better than their costs.

A unit's sample is doubled, up to all rows, while formats near its lower convex hull, from which
plans choose at one budget or another, cannot be told apart.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.arrays import Bools, Floats, Longs
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import Units
from bitknap.allocation.solvers.lower_hulls import options
from bitknap.estimators.costs.weighed_errors import format_bytes, stored_alike, table_of
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.quantization.rounding.magnitude import exponents_of, peaks
from bitknap.quantization.stacks.grouping import stack_pieces

# Rows of each unit that are rounded at first. From 8 or 32, plans lose the same, and as many rows
# or more are rounded in the end (benchmarks/results/cheaper_costs.md).
ROWS = 16
# Two formats are told apart when their costs differ by this many standard errors of the difference,
_APART = 2.0
# or when that standard error is below this share of the cost, as then either of them will do.
_EITHER = 0.1
# Bytes of float32 weights worked on at a time.
_PIECE = 1 << 27


@dataclass(frozen=True, slots=True, eq=False)
class Picked:
    """Some rows of some matrices of a stack, m matrices with k rows each.

    Attributes:
        matrices: places in the stack, int64 [m].
        rows: rows of each matrix, int64 [m, k].
    """

    matrices: Tensor
    rows: Tensor

    def of(self, stack: Tensor) -> Tensor:
        """Return the picked part of [n, rows, ...]; where there is one row for all, that row."""
        some = stack[self.matrices]
        if some.shape[1] == 1:
            return some
        return some[torch.arange(len(some))[:, None], self.rows]


def part(stack: Tensor, picked: Picked | None) -> Tensor:
    """Return the picked part of [n, rows, ...]; all of it if none is picked."""
    return stack if picked is None else picked.of(stack)


# Maps errors ΔW [m, k, in] of rows to their costs in nats per token [m, k].
RowCharge = Callable[[Tensor], Tensor]
# Maps picked rows, None for all rows of all matrices, to their charge.
PickedCharge = Callable[[Picked | None], RowCharge]
# Maps a stack of units and their weights to what charges their rows, on the weights' device.
WeighRows = Callable[[np.ndarray, Tensor], PickedCharge]


class Estimates(NamedTuple):
    """Costs of a unit estimated from a sample of its rows.

    Attributes:
        cost: float64 [G].
        away: what each sampled row adds to the error of each cost, float64 [k, G].
    """

    cost: Floats
    away: Floats

    @property
    def spread(self) -> Floats:
        """The standard error of each cost, float64 [G]."""
        spread: Floats = np.sqrt(np.square(self.away).sum(0))
        return spread


def sampled_table(
    evidence: Evidence,
    formats: Sequence[Format],
    weigh: WeighRows,
    provenance: Mapping[str, Any],
) -> CostTable:
    """Round some rows of every unit to every format and charge the errors.

    All rows are rounded if the evidence asks for a thorough table. The spread of the table is the
    standard error of each cost; it has none if all rows were rounded. The share of rows that were
    is in the provenance under "rows".

    Args:
        evidence: gives the units and their weights.
        formats: the options; a kept precision costs nothing.
        weigh: returns the charge of a stack of equally shaped units.
        provenance: the table's provenance, in addition to the evidence's.
    """
    units = evidence.units
    cost, spread = (np.zeros((len(units), len(formats))) for _ in range(2))
    rounded = 0
    for run in stack_pieces(units, _PIECE):
        weights = evidence.weights(run).to(evidence.device)
        alike = stored_alike(formats, weights.shape[2])
        stack = _Stack(evidence, run, weights, weigh(run, weights), list(alike))
        columns = [same[0] for same in alike.values()]
        nbytes = format_bytes(units, [formats[column] for column in columns])[run[0]]
        first = weights.shape[1] if evidence.effort.thorough else ROWS
        costs, errors, count = stack.costs(nbytes, first)
        for grid, same in enumerate(alike.values()):
            cost[run[:, None], same] = costs[:, grid, None]
            spread[run[:, None], same] = errors[:, grid, None]
        rounded += count
    share = rounded / int(units.rows.sum())
    table = table_of(evidence, formats, cost, {**provenance, "rows": share})
    return table if share == 1 else replace(table, spread=spread)


@dataclass(frozen=True, slots=True)
class _Stack:
    """Equally shaped units, and what rounding their rows costs.

    Attributes:
        evidence: gives the rounding and the seed.
        run: the units, int64 [n].
        weights: float32 [n, rows, in].
        charge: returns what charges picked rows.
        grids: the formats that differ on rows of this length.
    """

    evidence: Evidence
    run: np.ndarray
    weights: Tensor
    charge: PickedCharge
    grids: Sequence[Format]

    def costs(self, nbytes: Longs, first: int) -> tuple[Floats, Floats, int]:
        """Return costs and standard errors, float64 [n, G], and the number of rows rounded.

        Args:
            nbytes: bytes of a unit in each grid, int64 [G].
            first: number of rows of each unit to round at first.
        """
        count, every = self.weights.shape[:2]
        costs, errors = (np.zeros((count, len(self.grids))) for _ in range(2))
        if first >= every:
            costs[:] = self._errors(None).sum(1)
            return costs, errors, count * every
        sizes = self.charge(None)(self.weights).double().cpu().numpy()
        seed = int(self.evidence.provenance.get("seed", 0))
        order = np.stack([row_order(self.evidence.units, unit, seed) for unit in self.run])
        parts: list[list[Floats]] = [[] for _ in range(count)]
        left, start, rounded = np.arange(count), 0, 0
        while len(left):
            stop = min(max(first, 2 * start), every)
            picked = Picked(torch.from_numpy(left), torch.from_numpy(order[left, start:stop]))
            rounded += picked.rows.numel()
            estimates = []
            for place, rows in zip(left, self._errors(picked), strict=True):
                parts[place].append(rows)
                known, size = np.concatenate(parts[place]), sizes[place][order[place, :stop]]
                found = estimated(known, size, float(sizes[place].sum()), every)
                costs[place], errors[place] = found.cost, found.spread
                estimates.append(found)
            left, start = left[~told_apart(estimates, nbytes)], stop
        return costs, errors, rounded

    def _errors(self, picked: Picked | None) -> Floats:
        """Return rows' costs in each grid, float64 [m, k, G]; of all rows if none are picked."""
        weights, run, exponents, charge = self.weights, self.run, None, self.charge(picked)
        if picked is not None:
            weights, run = picked.of(weights), run[picked.matrices.numpy()]
            exponents = exponents_of(peaks(self.weights[picked.matrices]))
        costs = [
            charge(self.evidence.round_trip(run, weights, grid, exponents) - weights).double()
            for grid in self.grids
        ]
        together: Floats = torch.stack(costs, dim=2).cpu().numpy()
        return together


def row_order(units: Units, unit: int, seed: int) -> Longs:
    """Return the order in which rows of a unit are drawn; it depends on nothing but its name."""
    name = zlib.crc32(units.label(int(unit)).encode())
    return np.random.default_rng([seed, name]).permutation(int(units.rows[unit]))


def estimated(known: Floats, size: Floats, total: float, every: int) -> Estimates:
    """Return the costs of a unit from a sample of its rows.

    Args:
        known: the rows' costs in each grid, float64 [k, G].
        size: the same rows' sizes, float64 [k].
        total: the size of all rows together.
        every: number of all rows.
    """
    count = len(size)
    if count == every or not size.any():  # all rows, or rows without weights or inputs
        return Estimates(known.sum(0) * every / count, np.zeros_like(known))
    ratio = known.sum(0) / size.sum()
    scale = total / size.mean() * math.sqrt((1 - count / every) / (count * max(1, count - 1)))
    return Estimates(total * ratio, scale * (known - size[:, None] * ratio))


def told_apart(estimates: Sequence[Estimates], nbytes: Longs) -> Bools:
    """Return of which units every format near the lower hull can be told apart from it, bool [m].

    Args:
        estimates: one for each unit.
        nbytes: bytes of a unit in each grid, int64 [G].
    """
    cost = np.stack([one.cost for one in estimates])
    known = options(cost, np.broadcast_to(nbytes.astype(np.float64), cost.shape))
    told = [
        _told(one, nbytes, known.option[known.hull[:, unit], unit])
        for unit, one in enumerate(estimates)
    ]
    return np.array(told, dtype=np.bool_)


def _told(one: Estimates, nbytes: Longs, hull: Longs) -> bool:
    """Return whether the formats off the hull are clearly off it, or no worse than those on it."""
    if len(hull) < 2:
        return True
    at = np.searchsorted(nbytes[hull], nbytes).clip(1, len(hull) - 1)
    left, right = hull[at - 1], hull[at]
    share = ((nbytes - nbytes[left]) / (nbytes[right] - nbytes[left])).clip(0, 1)
    chord = (1 - share) * one.cost[left] + share * one.cost[right]
    away = one.away - (1 - share) * one.away[:, left] - share * one.away[:, right]
    error = np.sqrt(np.square(away).sum(0))
    unclear: Bools = (one.cost - chord < _APART * error) & (error > _EITHER * chord)
    unclear[hull] = False
    return not unclear.any()
