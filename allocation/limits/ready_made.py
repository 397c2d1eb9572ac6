"""Ready-made limits: decode speed, devices, shares, floors and caps, counts, custom sums.

Every function returns limits to give to a `Problem` along with a budget:
`Problem(table, [Budget.bits(2.5), *device_bytes(table, 8, at_most=2**30)])`. Names are unique
unless the same limit is made twice. A floor ("at least") is stored negated and marked as one. Each
limit holds U x F numbers, and every layer or rank gets a limit of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from bitknap.allocation.limits.devices import device_bytes
from bitknap.allocation.problem.arrays import Bools, Floats, Longs
from bitknap.allocation.problem.checks import as_float, number, whole
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.table import CostTable, shares, widths
from bitknap.allocation.problem.units import Unit
from bitknap.errors import InputError

__all__ = [
    "bits_per_layer",
    "bytes_per_token",
    "count_at_least",
    "count_at_most",
    "custom",
    "device_bytes",
    "share_at_most",
]

# Makes 0.29 of 100 weights equal 29, not 28.999999999999996.
_WHOLE = 1 + 1e-12

Weight = npt.ArrayLike | Callable[[Unit, Format], float]


def bytes_per_token(
    table: CostTable,
    at_most: float,
    frequency: npt.ArrayLike | None = None,
    *,
    name: str = "bytes per token",
) -> Limit:
    """Limit the expected bytes of weights read per token, which bound decoding speed.

    The sum over units of frequency × bytes (methods.md#decode-time, the time term of a memory-bound
    decoder that serves one request). With 1 - (1 - table.frequency)**n as the frequency, it limits
    the bytes that a batch of n unrelated tokens reads; an expert is read once for the whole batch.

    Args:
        table: the table.
        at_most: expected bytes per token.
        frequency: share of tokens that read each unit, float[U], 0 to 1; `table.frequency` when
            not given.
        name: shown in messages.

    Raises:
        InputError: a number is out of range, or no frequency is known.
    """
    given = table.frequency if frequency is None else frequency
    if given is None:
        raise InputError(
            "bytes_per_token: the table has no frequency; estimate it from a text, or give it"
        )
    share = shares(table.units, given)
    bound = number("at_most", at_most)
    return Limit(name, share[:, None] * table.nbytes, bound, unit="bytes")


def share_at_most(
    table: CostTable,
    share: float,
    bits: float,
    pattern: str | None = None,
    *,
    name: str | None = None,
) -> Limit:
    """Limit the share of weights in narrow formats, a guard against too many of them.

    Args:
        table: the table; its units need shapes.
        share: largest share of the weights of the selected units, from 0 to 1.
        bits: formats with at most this many bits count as narrow; a kept precision never does.
        pattern: units to select, as `Units.matches` reads it; all when not given.
        name: shown in messages; made from the bits and the pattern when not given.

    Raises:
        InputError: a number is out of range, units have no shapes, or the pattern is wrong.
    """
    part = number("share", share, high=1)
    narrow = widths(table.formats) <= number("bits", bits)
    rows = _selected(table, pattern)
    numel = _numel(table, rows, "share_at_most")
    total = int(numel.sum())
    return Limit(
        name or f"share at {bits:g} bits or fewer{_of(pattern)}",
        np.outer(numel, narrow),
        min(total, math.floor(part * total * _WHOLE)),
        note=f" of {total:.6g} weights",
        per=max(1, total),
    )


def bits_per_layer(
    table: CostTable,
    at_least: float | None = None,
    at_most: float | None = None,
    pattern: str | None = None,
    *,
    name: str = "bits per weight",
) -> tuple[Limit, ...]:
    """Limit each layer's average bits per weight, all bytes counted; one limit per layer and side.

    Args:
        table: the table; its units need shapes.
        at_least: floor of every layer, bits per weight.
        at_most: cap of every layer, bits per weight.
        pattern: units of a layer to select, as `Units.matches` reads it; all when not given.
        name: prefix of the limits' names; the layer and the side follow.

    Raises:
        InputError: a number is out of range, units have no shapes, or the pattern is wrong.
    """
    if at_least is None and at_most is None:
        raise InputError("bits_per_layer: give at_least, at_most or both")
    low = None if at_least is None else number("at_least", at_least)
    high = None if at_most is None else number("at_most", at_most)
    if low is not None and high is not None and low > high:
        raise InputError(f"at_least: {low:g} is above at_most, {high:g}; swap them")
    limits = []
    for layer, rows in _layers(table, pattern):
        weights = int(_numel(table, rows, "bits_per_layer").sum())
        nbytes = np.where(rows[:, None], table.nbytes, 0)
        called = f"{name}{_of(pattern)}, layer {layer}"
        limit = partial(Limit, unit="bytes", per=weights / 8)
        if low is not None:
            bound = -math.ceil(low * weights / 8 / _WHOLE)
            said = f" ({low:g} bits per weight)"
            limits.append(limit(f"{called}, at least", -nbytes, bound, note=said, floor=True))
        if high is not None:
            bound = math.floor(high * weights / 8 * _WHOLE)
            said = f" ({high:g} bits per weight)"
            limits.append(limit(f"{called}, at most", nbytes, bound, note=said))
    return tuple(limits)


def count_at_least(
    table: CostTable,
    count: int,
    bits: int,
    pattern: str = "role=routed,proj=down",
    per_layer: bool = True,
    *,
    wider: bool = False,
    name: str | None = None,
) -> tuple[Limit, ...]:
    """Require a number of units at a width; one limit per layer, or one overall.

    Units are counted, not weights. Every expert has exactly one down projection, so the default
    pattern counts experts wherever an expert has one format (profile "expert") and its matrices
    are not cut into blocks. MC-MoE's rule (arXiv 2410.06270), at least one expert at 3 bits and
    one at 2 in every layer:
    `[*count_at_least(table, 1, 3), *count_at_least(table, 1, 2)]` with `tie(profile("expert"))`.

    Args:
        table: the table.
        count: number of units required, at most the number selected.
        bits: the exact width, with any group size.
        pattern: units to count, as `Units.matches` reads it.
        per_layer: count in every layer that has such units, not over all layers together.
        wider: count wider formats as well; a kept precision is wider than every grid.
        name: prefix of the limits' names; the layer follows.

    Raises:
        InputError: a number is out of range, no format has the bits, or the pattern is wrong.
    """
    wanted = whole("count", count)
    counted = _counted(table, bits, wider)
    if wanted and not counted.any():
        known = ", ".join(dict.fromkeys(str(item.bits) for item in table.formats))
        raise InputError(f"bits: no format has {bits}{_or_more(wider)}; there are {known}")
    limits = []
    for where, rows in _parts(table, pattern, per_layer):
        there = int(rows.sum())
        if wanted > there:
            raise InputError(
                f"count: {wanted} is more than the {there} units of {pattern}{where}; lower it"
            )
        called = name or f"{pattern} at {bits} bits{_or_more(wider)}, at least {wanted}"
        limits.append(Limit(f"{called}{where}", np.outer(rows, -counted), -wanted, floor=True))
    return tuple(limits)


def count_at_most(
    table: CostTable,
    count: int,
    bits: int,
    pattern: str = "role=routed,proj=down",
    per_layer: bool = True,
    *,
    wider: bool = False,
    name: str | None = None,
) -> tuple[Limit, ...]:
    """Allow at most a number of units at a width; one limit per layer, or one overall.

    Arguments and errors are those of `count_at_least`, except that the count may exceed the number
    of units and the width need not have a format.
    """
    allowed = whole("count", count)
    counted = _counted(table, bits, wider)
    called = name or f"{pattern} at {bits} bits{_or_more(wider)}, at most {allowed}"
    return tuple(
        Limit(f"{called}{where}", np.outer(rows, counted), allowed)
        for where, rows in _parts(table, pattern, per_layer)
    )


def custom(
    table: CostTable,
    name: str,
    weight: Weight,
    at_most: float | None = None,
    at_least: float | None = None,
    *,
    unit: str = "",
) -> Limit:
    """Limit the sum of custom numbers, one for each unit and format.

    Args:
        table: the table.
        name: shown in messages.
        weight: numbers that broadcast to [U,F] ([F] is one per format, [U,1] one per unit), or a
            function of a unit and a format, called once for each pair, in Python.
        at_most: upper bound on the sum; a weight of +inf forbids the choice.
        at_least: lower bound on the sum, in place of `at_most`; stored negated; weights must be
            finite.
        unit: "bytes" makes messages show GiB.

    Raises:
        InputError: a weight is no number, the shape is wrong, or not exactly one bound is given.
    """
    if (at_most is None) == (at_least is None):
        raise InputError(f"limit {name}: give either at_most or at_least")
    values = _called(table, name, weight) if callable(weight) else _broadcast(table, name, weight)
    wrong = np.isnan(values) | np.isneginf(values)
    if at_least is not None:
        wrong |= np.isinf(values)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise InputError(
            f"limit {name}: weight of {_pair(table, row, column)} is {values[row, column]}; "
            "expected a number (+inf forbids under at_most)"
        )
    if at_least is not None:
        bound = -number("at_least", at_least, low=-math.inf)
        return Limit(name, -values, bound, unit=unit, floor=True)
    return Limit(name, values, number("at_most", at_most, low=-math.inf), unit=unit)


def _called(table: CostTable, name: str, weight: Callable[[Unit, Format], float]) -> Floats:
    values = np.empty(table.cost.shape)
    for row in range(len(table.units)):
        unit = table.units.row(row)
        for column, item in enumerate(table.formats):
            try:
                value = weight(unit, item)
            except Exception as error:
                said = " ".join(f"{type(error).__name__}: {error}".split())
                where = _pair(table, row, column)
                raise InputError(f"limit {name}: weight of {where} raised {said}") from error
            if (real := as_float(value)) is None:
                where = _pair(table, row, column)
                raise InputError(f"limit {name}: weight of {where} is {value!r}; return a number")
            values[row, column] = real
    return values


def _broadcast(table: CostTable, name: str, weight: npt.ArrayLike) -> Floats:
    given = np.asarray(weight)
    if given.dtype.kind not in "biuf":
        raise InputError(f"limit {name}: weight has dtype {given.dtype}, expected numbers")
    try:
        return np.broadcast_to(np.asarray(given, dtype=np.float64), table.cost.shape)
    except ValueError:
        raise InputError(
            f"limit {name}: weight has shape {given.shape}, expected {table.cost.shape}, "
            "[F], or [U,1] for one number a unit"
        ) from None


def _counted(table: CostTable, bits: int, wider: bool) -> Floats:
    bits_of_formats, wanted = widths(table.formats), whole("bits", bits)
    return (bits_of_formats >= wanted if wider else bits_of_formats == wanted).astype(np.float64)


def _selected(table: CostTable, pattern: str | None) -> Bools:
    if pattern is None:
        return np.ones(len(table.units), dtype=np.bool_)
    return table.units.matches(pattern)


def _layers(table: CostTable, pattern: str | None) -> Iterator[tuple[int, Bools]]:
    """Yield each layer that has selected units, with a mask of them, bool[U]."""
    rows = _selected(table, pattern)
    numbers = np.unique(table.units.layer[rows & (table.units.layer >= 0)])
    if not len(numbers):
        raise InputError(f"{pattern or 'units'}: none of these units is in a layer; choose others")
    for layer in numbers.tolist():
        yield layer, rows & (table.units.layer == layer)


def _parts(table: CostTable, pattern: str, per_layer: bool) -> Iterator[tuple[str, Bools]]:
    """Yield the suffix of each limit's name and a mask of the units it counts."""
    if not per_layer:
        yield "", _selected(table, pattern)
        return
    for layer, rows in _layers(table, pattern):
        yield f", layer {layer}", rows


def _numel(table: CostTable, rows: Bools, what: str) -> Longs:
    """Return the number of weights of each selected unit, 0 for others."""
    numel = np.where(rows, table.units.numel, 0)
    unknown = rows & (numel == 0)
    if unknown.any():
        label = table.units.label(int(unknown.argmax()))
        raise InputError(f"{what}: {label} has no shape; build the units with rows and cols")
    return numel


def _of(pattern: str | None) -> str:
    return f" of {pattern}" if pattern else ""


def _or_more(wider: bool) -> str:
    return " or more" if wider else ""


def _pair(table: CostTable, row: int, column: int) -> str:
    return f"{table.units.label(int(row))} {table.formats[column]}"
