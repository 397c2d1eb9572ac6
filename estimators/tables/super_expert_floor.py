"""Super experts are protected: no narrow grid for those that the model cannot do without.

Their cost in a narrow format is measured or estimated like any other, but an error there is
multiplied by an output far above their layer's, so a wrong cost does the most harm
(methods.md#pitfalls, pitfall 9). A floor of width is what frequency and Hessians cannot give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bitknap.allocation.problem.arrays import Bools
from bitknap.allocation.problem.checks import whole
from bitknap.allocation.problem.table import CostTable, widths
from bitknap.allocation.problem.units import ROLES, Units

# Bits that the units of a super expert get at least.
FLOOR = 4


def protected(
    table: CostTable, experts: Sequence[tuple[int, int, float]], bits: int = FLOOR
) -> CostTable:
    """Return the table where units of some experts may use no grid narrower than `bits`.

    A unit to which the table leaves no format that wide keeps the widest that it leaves. The
    provenance says "protected": bits, and how many units were held to them.

    Args:
        table: the costs; forbidden formats stay forbidden.
        experts: (layer, expert, ratio) as `super_experts` lists them.
        bits: the floor; 0 leaves the table as it is.

    Raises:
        InputError: `bits` is no whole number from 0, or a format is made up and has no bits.
    """
    if not whole("protect", bits):
        return table
    rows = np.flatnonzero(units_of(table.units, experts))
    cost = table.cost.copy()
    if len(rows):
        allowed = np.where(np.isfinite(cost[rows]), widths(table.formats), 0)
        # Keeping a unit's own widest format leaves each of them one.
        floor = np.minimum(bits, allowed.max(axis=1))
        cost[rows] = np.where(allowed >= floor[:, None], cost[rows], np.inf)
    said = {"bits": int(bits), "units": len(rows)}
    return replace(table, cost=cost, provenance={**table.provenance, "protected": said})


def unprotected(table: CostTable) -> CostTable:
    """Return the table with all formats of protected units allowed, at no cost where forbidden.

    It answers whether a limit can be met without protection, and nothing else: the costs that
    protection replaced are not in the table any more.
    """
    if not table.provenance.get("protected", {}).get("units"):
        return table
    rows = units_of(table.units, table.provenance.get("super_experts", ()))[:, None]
    cost = np.where(rows & ~np.isfinite(table.cost), 0.0, table.cost)
    return replace(table, cost=cost)


def comparable(table: CostTable) -> CostTable:
    """Return the table with only the formats that every unit may use, as it is if none rounds.

    Means over formats say which units are sensitive only if they are over the same formats.
    """
    common = np.isfinite(table.cost).all(axis=0)
    if common.all() or not table.cost[:, common].any():
        return table
    return replace(table, cost=np.where(common, table.cost, np.inf))


def units_of(units: Units, experts: Sequence[Sequence[float]]) -> Bools:
    """Return which units are of the routed experts (layer, expert, …), bool[U]."""
    # One number for each place, so that all experts are looked up at once.
    step = max([int(units.expert.max(initial=0)), *(int(one[1]) for one in experts)]) + 1
    wanted = [int(one[0]) * step + int(one[1]) for one in experts]
    place = units.layer.astype(np.int64) * step + units.expert
    routed = (units.role == ROLES.index("routed")) & (units.expert >= 0)
    mask: Bools = routed & np.isin(place, wanted)
    return mask
