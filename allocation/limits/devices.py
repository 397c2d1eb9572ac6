"""Expert parallelism: which rank holds which unit, and limits on what a rank holds."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Ints, frozen
from bitknap.allocation.problem.budget import Budget
from bitknap.allocation.problem.checks import number, whole
from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import ROLES
from bitknap.errors import InputError


def device_bytes(
    table: CostTable,
    ranks: int,
    at_most: float | None = None,
    balance: float | None = None,
    *,
    budget: Budget | Limit | float | None = None,
    device: npt.ArrayLike | None = None,
    name: str = "rank",
) -> tuple[Limit, ...]:
    """Limit the bytes of every rank under expert parallelism; one limit per rank.

    Expert e of the E experts in a layer lies on rank e·ranks // E; all other units lie on every
    rank. With `at_most`, a rank's bytes include its experts and the units that lie on every rank.
    With `balance`, a rank's experts take at most `balance` times an even share of the bytes that
    the budget leaves for experts: experts on the rank <= balance × (budget - bytes on every rank) /
    ranks.

    Args:
        table: the table.
        ranks: number of devices.
        at_most: bytes of the units on one rank.
        balance: at least 1; 1 means perfectly even.
        budget: with `balance`, bytes of all units, each counted once: a budget, the limit it
            resolved to, or a number.
        device: rank of each unit, in place of the default placement, int[U]; -1 for every rank.
        name: prefix of the limits' names; the rank follows, such as "rank 3".

    Raises:
        InputError: a number is out of range, or not exactly one kind of bound is given.
    """
    count = whole("ranks", ranks, low=1)
    place = _contiguous(table, count) if device is None else _given(table, count, device)
    if (at_most is None) == (balance is None) or (balance is None) != (budget is None):
        raise InputError("device_bytes: give either at_most, or balance and budget")
    everywhere, note = 1.0, ""
    if at_most is not None:
        bound = number("at_most", at_most)
    elif balance is not None and budget is not None:
        even = _bytes_of(table, budget) / count
        everywhere = number("balance", balance, low=1) / count
        bound, note = balance * even, f", {balance:g} times an even share"
    return tuple(
        Limit(
            f"{name} {rank}",
            np.where(place == rank, 1.0, np.where(place < 0, everywhere, 0.0))[:, None]
            * table.nbytes,
            bound,
            unit="bytes",
            note=note,
        )
        for rank in range(count)
    )


def _contiguous(table: CostTable, ranks: int) -> Ints:
    """Return the rank of each routed unit, experts in contiguous runs; -1 for other units."""
    units = table.units
    routed = (units.role == ROLES.index("routed")) & (units.expert >= 0)
    if not routed.any():
        raise InputError("device_bytes: the table has no routed experts to place; give device")
    experts = np.zeros(int(units.layer.max()) + 2, dtype=np.int64)
    np.maximum.at(experts, units.layer[routed] + 1, units.expert[routed] + 1)
    few = (experts > 0) & (experts < ranks)
    if few.any():
        layer = int(few.argmax())
        raise InputError(
            f"ranks: {ranks} is more than the {experts[layer]} experts of layer {layer - 1}; "
            "lower it or give device"
        )
    number = units.expert.astype(np.int64) * ranks // np.maximum(experts[units.layer + 1], 1)
    return np.where(routed, number, -1).astype(np.int32)


def _given(table: CostTable, ranks: int, device: npt.ArrayLike) -> Ints:
    if ranks > len(table.units):
        raise InputError(f"ranks: {ranks} is more than the {len(table.units)} units; lower it")
    place = frozen("device", device, np.int32, (len(table.units),))
    wrong = (place < -1) | (place >= ranks)
    if wrong.any():
        unit = int(wrong.argmax())
        raise InputError(
            f"device: {table.units.label(unit)} is on rank {place[unit]}; "
            f"expected 0 to {ranks - 1}, or -1 for all"
        )
    return place


def _bytes_of(table: CostTable, budget: Budget | Limit | float) -> float:
    if isinstance(budget, Budget):
        budget = budget.limit(table)
    if not isinstance(budget, Limit):
        return number("budget", budget)
    if budget.unit != "bytes" or not math.isfinite(budget.bound):
        raise InputError(f"budget: the limit {budget.name} is not a number of bytes")
    return budget.bound
