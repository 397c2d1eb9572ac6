"""Protection of super experts: no narrow grid for experts that the model cannot do without.

Their cost in a narrow format is measured or estimated like any other, but an error there is
multiplied by an output far above their layer's, so a wrong cost does the most harm
(methods.md#pitfalls, pitfall 9). Frequency and Hessians do not protect them; a minimum width
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bitknap.allocation.problem.arrays import Bools
from bitknap.allocation.problem.checks import whole
from bitknap.allocation.problem.table import CostTable, widths
from bitknap.allocation.problem.units import ROLES, Units

# Minimum bits of the units of a super expert.
FLOOR = 4


def protected(
    table: CostTable, experts: Sequence[tuple[int, int, float]], bits: int = FLOOR
) -> CostTable:
    """Return the table where units of some experts may use no grid narrower than `bits`.

    A unit whose allowed formats are all narrower keeps the widest of them. The provenance entry
    "protected" holds the bits and the number of protected units.

    Args:
        table: the costs; forbidden formats stay forbidden.
        experts: (layer, expert, ratio) as `super_experts` lists them.
        bits: the floor; 0 leaves the table as it is.

    Raises:
        InputError: `bits` is negative or not an integer, or a format has no known bits.
    """
    if not whole("protect", bits):
        return table
    rows = np.flatnonzero(units_of(table.units, experts))
    cost = table.cost.copy()
    if len(rows):
        allowed = np.where(np.isfinite(cost[rows]), widths(table.formats), 0)
        # Every unit keeps at least its own widest format.
        floor = np.minimum(bits, allowed.max(axis=1))
        cost[rows] = np.where(allowed >= floor[:, None], cost[rows], np.inf)
    said = {"bits": int(bits), "units": len(rows)}
    return replace(table, cost=cost, provenance={**table.provenance, "protected": said})


def unprotected(table: CostTable) -> CostTable:
    """Return the table with all formats of protected units allowed; forbidden ones cost 0.

    Use it only to test whether a limit can be met without protection: the table no longer has the
    costs that protection replaced.
    """
    if not table.provenance.get("protected", {}).get("units"):
        return table
    rows = units_of(table.units, table.provenance.get("super_experts", ()))[:, None]
    cost = np.where(rows & ~np.isfinite(table.cost), 0.0, table.cost)
    return replace(table, cost=cost)


def comparable(table: CostTable) -> CostTable:
    """Return the table with only the formats that every unit may use; unchanged if none rounds.

    Means over formats are comparable between units only if they are over the same formats.
    """
    common = np.isfinite(table.cost).all(axis=0)
    if common.all() or not table.cost[:, common].any():
        return table
    return replace(table, cost=np.where(common, table.cost, np.inf))


def units_of(units: Units, experts: Sequence[Sequence[float]]) -> Bools:
    """Return which units belong to the given routed experts (layer, expert, …), bool[U]."""
    # One number per (layer, expert), so that all experts are looked up at once.
    step = max([int(units.expert.max(initial=0)), *(int(one[1]) for one in experts)]) + 1
    wanted = [int(one[0]) * step + int(one[1]) for one in experts]
    place = units.layer.astype(np.int64) * step + units.expert
    routed = (units.role == ROLES.index("routed")) & (units.expert >= 0)
    mask: Bools = routed & np.isin(place, wanted)
    return mask
