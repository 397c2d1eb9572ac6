"""GEMQ's program: choose one bit width for every expert, over all layers at once.

Source: GEMQ, arXiv 2605.23078, and its code; it counts bits, not bytes. Its costs are computed in
`bitknap.estimators.published.gemq`, which needs torch; this file does not.
"""

from __future__ import annotations

import math

import numpy as np

from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.problem import Problem
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import ROLES
from bitknap.errors import InputError


def gemq_problem(table: CostTable, average: float, *, floors: bool = True) -> Problem:
    """Return GEMQ's program over all layers at once, for any solver that takes several limits.

    Bits are counted, not bytes: every unit counts the same, even a large shared expert. Without the
    floors a whole layer may end at the lowest width; with them, at least one routed expert of each
    layer has the most bits and one the second most.

    Args:
        table: units by widths; tie it with `profile("expert")` for one width per expert, as in the
            paper.
        average: average bits per unit.
        floors: whether to require the top two widths in every layer.

    Raises:
        InputError: the formats have no bits, or there are fewer than two widths for the floors.

    Source: GEMQ, arXiv 2605.23078, and its code.
    """
    bits = np.array([item.bits for item in table.formats])
    if not (bits > 0).all():
        raise InputError("gemq: made-up formats have no bits; give the table real formats")
    if not (math.isfinite(average) and average > 0):
        raise InputError(f"gemq: an average of {average} bits; it must be above 0")
    # An average such as 2.1 times a count must not lose a bit to rounding.
    total = math.floor(round(average * len(table.units), 6))
    limits = [Limit("bits", bits[None, :], total)]
    if floors:
        widths = sorted(set(bits.tolist()), reverse=True)[:2]
        if len(widths) < 2:
            raise InputError("gemq: floors need two widths; add formats or set floors=False")
        routed = table.units.role == ROLES.index("routed")
        for layer in np.unique(table.units.layer[routed]).tolist():
            here = routed & (table.units.layer == layer)
            for width in widths:
                weight = np.where(here[:, None] & (bits == width), -1.0, 0.0)
                limits.append(Limit(f"layer {layer} at {width} bits", weight, -1, floor=True))
    return Problem(table, limits)
