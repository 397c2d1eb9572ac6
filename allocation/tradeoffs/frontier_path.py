"""The frontier: the plans of every byte budget, from one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from bitknap.allocation.plans.plan import CARRIED, BitPlan
from bitknap.allocation.problem.arrays import Floats, Ints, Longs, frozen
from bitknap.allocation.problem.budget import Budget, human
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import Units
from bitknap.allocation.solvers.lagrangian_path import lagrangian_path, taken
from bitknap.allocation.tradeoffs.frontier_file import read_frontier, write_frontier
from bitknap.errors import FileError, InfeasibleError, InputError

# Provenance keys that plans keep, and those that budgets and figures need in addition.
_KEPT = (*CARRIED, "model", "unit", "fixed_bytes", "source_bytes")


class FrontierPoint(NamedTuple):
    """One plan of the frontier: bits per weight (None without shapes), bytes, nats per token."""

    bits_per_weight: float | None
    nbytes: int
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frontier:
    """The Lagrangian path of a table: S steps, each moving one row to a heavier, better format.

    The plan after every step is optimal at its own bytes. The line between two such plans is a
    lower bound on the cost. Formats above the convex hull of their row are never on the path;
    `solve` uses them to fill the bytes between two steps, so its plans may be better there, but
    they are not nested.

    Attributes:
        units: the units.
        formats: the formats available.
        unit_bytes: stored bytes, int64[U,F].
        row_of: row of each unit, int32[U]; tied units share one.
        start: format of each row in the smallest plan, int32[R].
        row: row that each step moves, int32[S].
        format: format that each step gives its row, int32[S].
        nbytes: bytes of the plan after 0, 1, … S steps, int64[S+1], rising.
        cost: cost of that plan, float64[S+1], nats per token, falling.
        header: where the table came from; JSON values.
    """

    units: Units
    formats: tuple[Format, ...]
    unit_bytes: Longs
    row_of: Ints
    start: Ints
    row: Ints
    format: Ints
    nbytes: Longs
    cost: Floats
    header: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count, width = len(self.units), len(self.formats)
        steps, rows = np.shape(self.row), np.shape(self.start)
        values: dict[str, Any] = {
            "formats": tuple(self.formats),
            "unit_bytes": frozen("unit_bytes", self.unit_bytes, np.int64, (count, width)),
            "row_of": frozen("row_of", self.row_of, np.int32, (count,)),
            "start": frozen("start", self.start, np.int32, rows),
            "row": frozen("row", self.row, np.int32, steps),
            "format": frozen("format", self.format, np.int32, steps),
            "nbytes": frozen("nbytes", self.nbytes, np.int64, (steps[0] + 1,)),
            "cost": frozen("cost", self.cost, np.float64, (steps[0] + 1,)),
            "header": MappingProxyType(dict(self.header)),
        }
        for name, size in {
            "row_of": rows[0],
            "start": width,
            "row": rows[0],
            "format": width,
        }.items():
            wrong = (values[name] < 0) | (values[name] >= size)
            if wrong.any():
                raise InputError(f"{name}: {values[name][wrong][0]} is outside 0 to {size - 1}")
        if (np.diff(values["nbytes"]) < 0).any() or not np.isfinite(values["cost"]).all():
            raise InputError(
                "frontier: bytes must rise from step to step, and costs must be finite"
            )
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def weights(self) -> int:
        """Weights of all units together; 0 when shapes are unknown."""
        return int(self.units.numel.sum())

    def plan(self, budget: int | Budget) -> BitPlan:
        """Return the last plan of the path within a budget; a number means bytes of the units.

        The plan for a larger budget only upgrades units of the plan for a smaller one.

        Raises:
            InfeasibleError: the smallest plan is above the budget.
            InputError: the budget refers to a number that the table lacked.
        """
        limit = self._limit(budget)
        steps = int(np.searchsorted(self.nbytes, limit.bound, side="right")) - 1
        if steps < 0:
            raise InfeasibleError(
                f"{limit.name}: smallest plan needs {human(self.nbytes[0])}, limit is "
                f"{human(limit.bound)}{limit.note}; raise the limit or add a narrower format"
            )
        rows = taken(self.start, self.row[:steps], self.format[:steps])
        choice = rows[self.row_of]
        kept = {key: self.header[key] for key in CARRIED if key in self.header}
        cost = float(self.cost[steps])
        result = {"solver": "frontier", "objective": cost, "limits": {limit.name: limit.bound}}
        return BitPlan.from_choice(
            self.units,
            self.formats,
            choice,
            nbytes=self.unit_bytes[np.arange(len(choice)), choice],
            model=str(self.header.get("model", "")),
            header={**kept, **result, "bound": min(self.bound_at(limit.bound), cost)},
        )

    def bound_at(self, nbytes: float) -> float:
        """Return a lower bound on the cost of plans of at most `nbytes`; +inf if there are none."""
        if nbytes < self.nbytes[0]:
            return float("inf")
        return float(np.interp(nbytes, self.nbytes, self.cost))

    def points(self, count: int = 200) -> tuple[FrontierPoint, ...]:
        """Return at most `count` plans, evenly spaced in bytes, including the first and the last.

        Raises:
            InputError: `count` is below 2.
        """
        if count < 2:
            raise InputError(f"points: {count} is below 2, the first and the last")
        wanted = np.linspace(self.nbytes[0], self.nbytes[-1], count)
        wanted[-1] = self.nbytes[-1]
        index = np.unique(np.searchsorted(self.nbytes, wanted, side="right") - 1)
        if len(self.nbytes) <= count:
            index = np.arange(len(self.nbytes))
        weights = self.weights if self.units.has_shapes else 0
        return tuple(
            FrontierPoint(8 * size / weights if weights else None, size, cost)
            for size, cost in zip(
                self.nbytes[index].tolist(), self.cost[index].tolist(), strict=True
            )
        )

    def save(self, path: str | Path) -> None:
        """Write the frontier atomically as JSON."""
        stored = {item.name: getattr(self, item.name) for item in fields(self)}
        write_frontier(stored, self.points(), Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Frontier:
        """Read a frontier.

        Raises:
            FileError: the file is missing, corrupt, of an unknown version, or contradicts itself.
        """
        stored = read_frontier(Path(path))
        try:
            made = cls(**stored)
        except InputError as error:
            raise FileError(f"{path}: {error}") from None
        unit = np.arange(len(made.units))
        for step in (0, len(made.row)):
            rows = taken(made.start, made.row[:step], made.format[:step])
            size = int(made.unit_bytes[unit, rows[made.row_of]].sum())
            if size != made.nbytes[step]:
                raise FileError(
                    f"{path}: steps.bytes[{step}]: {made.nbytes[step]}, but the units add up to "
                    f"{size}; make the frontier again"
                )
        return made

    def _limit(self, budget: int | Budget) -> Limit:
        wanted = budget if isinstance(budget, Budget) else Budget.bytes(budget)
        shape = self.unit_bytes.shape
        return wanted.limit(
            CostTable(
                units=self.units,
                formats=self.formats,
                cost=np.zeros(shape),
                nbytes=self.unit_bytes,
                provenance=self.header,
            )
        )


def frontier(source: CostTable | Problem) -> Frontier:
    """Return the plans of every byte budget: all hull steps, by falling gain per byte.

    Pruned by dominance and to convex hulls, then sorted once: O(U F^2 + S log S). See Kellerer,
    Pferschy and Pisinger (2004), section 11.2, for the linear relaxation that the path solves.

    Args:
        source: a table, or a problem whose only limit is a budget of bytes (its bound is ignored).

    Raises:
        InputError: the problem has a limit on something other than the table's bytes.
    """
    table = source.table if isinstance(source, Problem) else source
    for limit in source.limits if isinstance(source, Problem) else ():
        weight = np.broadcast_to(limit.weight, table.cost.shape)
        if not np.array_equal(weight, table.nbytes):
            raise InputError(
                f"frontier: the limit {limit.name} is not on the table's bytes; "
                "use Greedy for nested plans under other limits"
            )
    whole = Problem(table, Limit("memory", table.nbytes, np.inf, unit="bytes"))
    path = lagrangian_path(whole.cost, whole.weights[0])
    kept = {key: table.provenance[key] for key in _KEPT if key in table.provenance}
    return Frontier(
        units=table.units,
        formats=table.formats,
        unit_bytes=table.nbytes,
        row_of=whole.row_of,
        start=path.start.astype(np.int32),
        row=path.row.astype(np.int32),
        format=path.option.astype(np.int32),
        nbytes=path.weight.astype(np.int64),
        cost=path.cost,
        header=kept,
    )
