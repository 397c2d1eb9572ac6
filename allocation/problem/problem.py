"""The problem: a table and limits, validated once and summed over ties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Floats, Ints, frozen, numbered
from bitknap.allocation.problem.budget import Budget
from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.table import CostTable
from bitknap.errors import InputError

__all__ = ["Budget", "Limit", "Problem"]


@dataclass(frozen=True, slots=True, init=False, eq=False)
class Problem:
    """Choose one format per row at the least cost within every limit.

    A row is one unit, or several tied units with costs and weights summed; solvers see rows.

    Attributes:
        table: the table as given.
        limits: the limits, budgets resolved.
        cost: float64[R,F], nats per token; +inf forbids.
        weights: float64[M,R,F]; 0 where the cost is +inf.
        bounds: float64[M].
        row_of: row of each unit, int32[U].
    """

    table: CostTable
    limits: tuple[Limit, ...]
    cost: Floats
    weights: Floats
    bounds: Floats
    row_of: Ints

    def __init__(self, table: CostTable, limits: Sequence[Limit | Budget] | Limit | Budget) -> None:
        """Resolve the budgets and sum over ties.

        Raises:
            InputError: a limit has the wrong shape, two share a name, or a row has no allowed
                format.
        """
        given = [limits] if isinstance(limits, Limit | Budget) else list(limits)
        resolved = tuple(x.limit(table) if isinstance(x, Budget) else x for x in given)
        names = [limit.name for limit in resolved]
        if len(set(names)) != len(names):
            raise InputError(
                f"limits: {names}: a name appears twice; give each limit its own name, and at "
                "most one budget"
            )
        weights = _broadcast(resolved, table.cost.shape)
        cost, rows = table.cost, np.arange(len(table.units), dtype=np.int32)
        if table.ties is not None:
            rows = numbered(table.ties)
            cost = _summed(cost, rows)
            weights = np.array([_summed(weight, rows) for weight in weights])
            weights = weights.reshape(len(resolved), *cost.shape)
        forbidden = (cost == np.inf) | (weights == np.inf).any(axis=0)
        stuck = forbidden.all(axis=1)
        if stuck.any():
            unit = table.units.label(int(np.argmax(stuck[rows])))
            tied = "" if table.ties is None else " and the units tied to it"
            raise InputError(
                f"{unit}{tied}: every format is forbidden; relax the pins or the table"
            )
        weights[:, forbidden] = 0
        values = {
            "table": table,
            "limits": resolved,
            "cost": frozen("cost", np.where(forbidden, np.inf, cost), np.float64),
            "weights": frozen("weights", weights, np.float64),
            "bounds": frozen("bounds", [limit.bound for limit in resolved], np.float64),
            "row_of": frozen("row_of", rows, np.int32),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def expand(self, choice: npt.ArrayLike) -> Ints:
        """Return the choice of each unit from the choice of each row, int32[U]."""
        return np.asarray(choice, dtype=np.int32)[self.row_of]


def _broadcast(limits: Sequence[Limit], shape: tuple[int, ...]) -> Floats:
    """Return the weights of all limits, float64[M,U,F]."""
    weights = np.empty((len(limits), *shape))
    for index, limit in enumerate(limits):
        given = limit.weight.shape
        if any(size not in (1, full) for size, full in zip(given, shape, strict=True)):
            raise InputError(f"limit {limit.name}: weight has shape {given}, expected {shape}")
        weights[index] = limit.weight
    return weights


def _summed(values: Floats, rows: Ints) -> Floats:
    """Sum [U,F] over the units of each row, [R,F]."""
    return np.stack([np.bincount(rows, weights=column) for column in values.T], axis=1)
