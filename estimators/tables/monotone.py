"""Monotone repair: more bits never cost more, within one family of grids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitknap.allocation.problem.arrays import Bools, Floats, Longs
from bitknap.allocation.problem.table import CostTable

# Relative changes below this are rounding errors of a mean, not repairs.
_ROUNDING = 1e-12


def isotonic(table: CostTable) -> tuple[CostTable, int]:
    """Return the table with costs non-increasing in bits, and how many costs were changed.

    A family is the grids with one group size, zero point and metadata. Within it each unit's costs
    are replaced by their least-squares non-increasing fit, as found by pooling adjacent violators
    (Ayer et al. 1955), here by its minimum-maximum formula. Forbidden formats stay forbidden and
    do not count. The number is in the provenance under "repaired".
    """
    cost = table.cost.copy()
    repaired = 0
    for columns in _families(table):
        before = cost[:, columns]
        rising = _rises(before)
        if not rising.any():
            continue
        fitted = non_increasing(before[rising])
        allowed = np.isfinite(before[rising])
        moved = np.abs(fitted[allowed] - before[rising][allowed])
        repaired += int((moved > _ROUNDING * np.abs(before[rising][allowed])).sum())
        cost[np.ix_(rising, columns)] = fitted
    provenance = {**table.provenance, "repaired": repaired}
    return replace(table, cost=cost, provenance=provenance), repaired


def non_increasing(values: Floats) -> Floats:
    """Return the least-squares non-increasing fit of each row, float64 [n, m]; inf stays inf."""
    allowed = np.isfinite(values)
    known = np.where(allowed, values, 0.0)
    fitted = np.full(values.shape, np.inf)
    # Fit i is the least over j <= i of the greatest over k >= i of the mean of j .. k.
    for start in range(values.shape[1]):
        count = np.cumsum(allowed[:, start:], axis=1)
        total = np.cumsum(known[:, start:], axis=1)
        mean = np.where(count > 0, total / np.maximum(count, 1), -np.inf)
        highest = np.maximum.accumulate(mean[:, ::-1], axis=1)[:, ::-1]
        fitted[:, start:] = np.minimum(fitted[:, start:], highest)
    return np.where(allowed, fitted, values)


def _families(table: CostTable) -> list[Longs]:
    """Return the columns of each family that has two or more, by width."""
    families: dict[tuple[int, bool, str], list[int]] = {}
    for column, f in sorted(enumerate(table.formats), key=lambda item: item[1].bits):
        if f.kind == "grid":
            families.setdefault((f.group_size, f.symmetric, f.metadata), []).append(column)
    return [np.array(columns) for columns in families.values() if len(columns) > 1]


def _rises(values: Floats) -> Bools:
    """Return which rows [n, m] rise somewhere, forbidden formats left out, bool [n]."""
    allowed = np.isfinite(values)
    lowest = np.minimum.accumulate(np.where(allowed, values, np.inf), axis=1)[:, :-1]
    rises: Bools = allowed[:, 1:] & (values[:, 1:] > lowest)
    return np.asarray(rises.any(axis=1))
