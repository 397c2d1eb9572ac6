"""Differences between two plans of the same units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Bools, Ints, Longs, frozen
from bitknap.allocation.problem.units import Units, kinds
from bitknap.errors import MismatchError


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Counts of changes among some units.

    Attributes:
        layer: decoder layer; -1 when there is none.
        kind: projection, with its role unless that is routed.
        up: units that take more bytes than before.
        down: units that take fewer bytes than before.
        other: units in a different format of equal size.
        same: units in the same format.
        nbytes: change in the total bytes of these units; negative when they shrank.
    """

    layer: int
    kind: str
    up: int
    down: int
    other: int
    same: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanDiff:
    """Two plans, with their units in the same order.

    Attributes:
        before: the old plan.
        after: the new plan, its units in the order of `before`.
        delta: change in the bytes of each unit, after minus before, int64[U].
        changed: units whose format changed, or whose bytes changed in the same format, bool[U].
    """

    before: BitPlan
    after: BitPlan
    delta: Longs
    changed: Bools

    @property
    def units(self) -> Units:
        """The units of both plans."""
        return self.before.units

    def moved(self, mask: Bools, layer: int = -1, kind: str = "all") -> Moved:
        """Return the changes among the units of `mask`, bool[U]."""
        delta, changed = self.delta[mask], self.changed[mask]
        return Moved(
            layer=layer,
            kind=kind,
            up=int((delta > 0).sum()),
            down=int((delta < 0).sum()),
            other=int((changed & (delta == 0)).sum()),
            same=int((~changed).sum()),
            nbytes=int(delta.sum()),
        )

    def groups(self) -> list[Moved]:
        """Return the changes by layer, then by projection."""
        layers, of_kind = self.units.layer, kinds(self.units)
        return [
            self.moved(mask & (layers == layer), int(layer), kind)
            for layer in np.unique(layers)
            for kind, mask in of_kind.items()
            if (mask & (layers == layer)).any()
        ]

    def transitions(self) -> tuple[list[str], list[str], Longs]:
        """Return the formats before, the formats after, and unit counts by transition.

        Formats are sorted by bytes per weight, then by name; counts are int64[F,G].
        """
        rows, row = _ranked(self.before)
        columns, column = _ranked(self.after)
        counts = np.zeros((len(rows), len(columns)), dtype=np.int64)
        np.add.at(counts, (row, column), 1)
        return rows, columns, counts

    def largest(self, count: int) -> Longs:
        """Return the units whose bytes changed most, most first, int64; ties in order of units."""
        size = np.abs(self.delta)
        order = np.lexsort((np.arange(len(size)), -size))
        return np.asarray(order[self.changed[order]][:count])


def plan_diff(before: BitPlan, after: BitPlan) -> PlanDiff:
    """Return the differences between two plans of one model; the order of units does not matter.

    Raises:
        MismatchError: the plans are for different models or have different units.
    """
    if before.model and after.model and before.model != after.model:
        raise MismatchError(
            f"plans: one is of model {before.model[:12]}, the other of {after.model[:12]}; "
            "compare plans of the same model"
        )
    after = _ordered_as(after, before.units)
    delta = frozen("delta", after.nbytes - before.nbytes, np.int64)
    changed = frozen("changed", (_names(before) != _names(after)) | (delta != 0), np.bool_)
    return PlanDiff(before=before, after=after, delta=delta, changed=changed)


def _ordered_as(plan: BitPlan, units: Units) -> BitPlan:
    """Return the plan with its units reordered as in `units`, which must hold the same units."""
    wanted, there = _keys(units), _keys(plan.units)
    if wanted == there:
        return plan
    place = {key: unit for unit, key in enumerate(there)}
    missing = [unit for unit, key in enumerate(wanted) if key not in place]
    if missing or len(wanted) != len(there):
        raise MismatchError(_apart(units, plan.units, missing))
    order = np.array([place[key] for key in wanted])
    return BitPlan.from_choice(
        units,
        plan.formats,
        plan.choice[order],
        nbytes=plan.nbytes[order],
        model=plan.model,
        header=plan.header,
    )


def _apart(before: Units, after: Units, missing: list[int]) -> str:
    counts = f"{len(before):,} and {len(after):,} units"
    only = f"; only the first has {before.label(missing[0])}" if missing else ""
    return f"plans: {counts}, which differ{only}; compare plans made from one table"


def _keys(units: Units) -> list[tuple[Any, ...]]:
    """Return what identifies each unit: its key, names as texts, and its shape."""
    names = [units.projections[index] for index in units.projection.tolist()]
    columns = (units.layer, units.role, units.expert, units.block, units.rows, units.cols)
    return list(zip(names, *(column.tolist() for column in columns), strict=True))


def _names(plan: BitPlan) -> npt.NDArray[Any]:
    return np.array([item.name for item in plan.formats])[plan.choice]


def _ranked(plan: BitPlan) -> tuple[list[str], Ints]:
    """Return the names of the formats in use, narrow ones first, and each unit's index."""
    used, place = np.unique(plan.choice, return_inverse=True)
    sizes = np.bincount(place, weights=plan.nbytes)
    weights = np.maximum(np.bincount(place, weights=plan.units.numel), 1)
    names = [plan.formats[index].name for index in used.tolist()]
    width = (sizes / weights).tolist()
    order = sorted(range(len(names)), key=lambda i: (width[i], names[i]))
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return [names[index] for index in order], rank[place]
