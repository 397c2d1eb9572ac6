"""The cost table: cost in nats per token and size in bytes of every unit in every format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Bools, Floats, Ints, Longs, frozen, numbered
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.profiles import Profile
from bitknap.allocation.problem.table_file import read_table, write_table
from bitknap.allocation.problem.units import Units
from bitknap.errors import FileError, InputError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CostTable:
    """Costs and bytes of units by formats; validated and immutable.

    Attributes:
        units: the rows.
        formats: the columns.
        cost: expected increase of next-token loss, float64[U,F], nats per token; +inf forbids.
        nbytes: stored bytes, int64[U,F]; equal to `Format.nbytes` wherever that is defined.
        spread: standard deviation of `cost`, float64[U,F], or None.
        ties: group of each unit, int32[U]; units of one group share a format. Or None.
        frequency: share of tokens that read the unit's weights, float64[U], 0 to 1: the routing
            frequency of its expert, 1 for units that every token uses; or None.
        provenance: where the numbers come from; JSON values only. Keys used by this library:
            "fixed_bytes", bytes of everything in the checkpoint that is not a unit; "source_bytes",
            bytes of the source checkpoint; "model", its fingerprint.
    """

    units: Units
    formats: tuple[Format, ...]
    cost: Floats
    nbytes: Longs
    spread: Floats | None = None
    ties: Ints | None = None
    frequency: Floats | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.units), len(self.formats))
        if len(set(self.formats)) != len(self.formats) or not self.formats:
            names = ", ".join(str(item) for item in self.formats)
            raise InputError(f"formats: [{names}] must be distinct and at least one")
        values: dict[str, Any] = {
            "formats": tuple(self.formats),
            "cost": frozen("cost", self.cost, np.float64, shape),
            "nbytes": frozen("nbytes", self.nbytes, np.int64, shape),
            "provenance": _plain(self.provenance),
        }
        if self.spread is not None:
            values["spread"] = frozen("spread", self.spread, np.float64, shape)
        if self.ties is not None:
            values["ties"] = frozen("ties", self.ties, np.int32, shape[:1])
        if self.frequency is not None:
            values["frequency"] = shares(self.units, self.frequency)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_numbers()
        self._check_bytes()

    def _check_numbers(self) -> None:
        self._refuse("cost", np.isnan(self.cost), "use inf to forbid a format")
        self._refuse(
            "cost", self.cost < 0, "costs are losses of at least 0; clip measured noise at 0"
        )
        self._refuse("nbytes", self.nbytes <= 0, "bytes must be above 0")
        if self.spread is not None:
            self._refuse("spread", ~(self.spread >= 0), "a spread is a number of at least 0")

    def _check_bytes(self) -> None:
        stored, shape = storage_of_shapes(self.units, self.formats)
        for column in range(len(self.formats)):  # one at a time: all take as much as the table
            known = stored[shape, column]
            wrong = (known >= 0) & (known != self.nbytes[:, column])
            if wrong.any():
                unit = int(wrong.argmax())
                where = f"{self.units.label(unit)} {self.formats[column]}"
                raise InputError(
                    f"nbytes: {where} has {self.nbytes[unit, column]}; "
                    f"the format stores {known[unit]}"
                )

    def _refuse(self, name: str, wrong: npt.NDArray[np.bool_], why: str) -> None:
        if wrong.any():
            unit, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
            value = getattr(self, name)[unit, column]
            where = f"{self.units.label(int(unit))} {self.formats[column]}"
            raise InputError(f"{name}: {where} has {value}; {why}")

    @classmethod
    def from_arrays(
        cls,
        cost: npt.ArrayLike,
        nbytes: npt.ArrayLike | None = None,
        units: Units | None = None,
        formats: Sequence[Format] | None = None,
        spread: npt.ArrayLike | None = None,
        provenance: Mapping[str, Any] | None = None,
        frequency: npt.ArrayLike | None = None,
    ) -> CostTable:
        """Build a table from bare numbers, [U,F] each; `frequency` is [U].

        Units and formats are made up when not given; `nbytes` follows from real ones when not
        given.

        Raises:
            InputError: shapes differ, a number is NaN, or the bytes cannot be derived.
        """
        costs = np.asarray(cost, dtype=np.float64)
        if costs.ndim != 2 or not costs.size:
            raise InputError(f"cost: shape {costs.shape}, expected [units, formats], not empty")
        chosen = tuple(formats or map(Format.made_up, range(costs.shape[1])))
        rows = units or Units.anonymous(costs.shape[0])
        if nbytes is None:
            nbytes = storage(rows, chosen)
            if (nbytes < 0).any():
                raise InputError("nbytes: give them, or units with shapes and real formats")
        return cls(
            units=rows,
            formats=chosen,
            cost=costs,
            nbytes=np.asarray(nbytes),
            spread=None if spread is None else np.asarray(spread),
            provenance=provenance or {},
            frequency=None if frequency is None else np.asarray(frequency),
        )

    @property
    def weights(self) -> int:
        """Weights of all units together; 0 when shapes are unknown."""
        return int(self.units.numel.sum())

    def tie(self, rule: Profile | npt.ArrayLike) -> CostTable:
        """Return a table where units of one group must share a format; earlier ties stay.

        Args:
            rule: a profile, or the group number of each unit, int[U].
        """
        labels = rule.labels(self.units) if isinstance(rule, Profile) else rule
        fresh = numbered(frozen("ties", labels, np.int64, (len(self.units),)))
        return replace(self, ties=fresh if self.ties is None else _joined(self.ties, fresh))

    def pin(
        self,
        pattern: str,
        bits: int | None = None,
        format: str | Format | None = None,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> CostTable:
        """Return a table where the selected units may only use some formats.

        Pins combine: a unit keeps only the formats that all of its pins allow. Give `bits`, or
        `format`, or one or both of `at_least` and `at_most`.

        Args:
            pattern: units to select, as `Units.matches` reads it.
            bits: allow only formats with this many bits.
            format: allow only this format.
            at_least: allow only formats with this many bits or more.
            at_most: allow only formats with this many bits or fewer. For both, a kept precision is
                wider than every grid (see `widths`).

        Raises:
            InputError: no such format, no such unit, or a unit is left without a format.
        """
        ranged = at_least is not None or at_most is not None
        if (bits is not None) + (format is not None) + ranged != 1:
            raise InputError(f"pin {pattern!r}: give one of bits, format, or at_least and at_most")
        if ranged:
            allowed, asked = _between(self.formats, at_least, at_most)
        elif bits is not None:
            allowed = np.array([item.bits == bits for item in self.formats])
            asked = f"has {bits} bits"
        else:
            wanted = Format.parse(format) if isinstance(format, str) else format
            allowed = np.array([item == wanted for item in self.formats])
            asked = f"is {wanted}"
        if not allowed.any():
            known = [str(item) if format is not None else str(item.bits) for item in self.formats]
            names = ", ".join(dict.fromkeys(known))
            raise InputError(f"pin {pattern!r}: no format {asked}; there are {names}")
        return self._allowing(pattern, allowed, asked)

    def _allowing(self, pattern: str, allowed: Bools, asked: str) -> CostTable:
        rows = self.units.matches(pattern)
        cost = self.cost.copy()
        cost[np.ix_(rows, ~allowed)] = np.inf
        stuck = ~np.isfinite(cost).any(axis=1) & rows
        if stuck.any():
            unit = int(np.argmax(stuck))
            raise InputError(
                f"pin {pattern!r}: leaves no format for {self.units.label(unit)}: every one that "
                f"{asked} is forbidden by an earlier pin or the table; drop one of the two"
            )
        return replace(self, cost=cost)

    def save(self, path: str | Path) -> None:
        """Write the table atomically as `.safetensors`."""
        write_table({item.name: getattr(self, item.name) for item in fields(self)}, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Read a table.

        Raises:
            FileError: the file is missing, truncated, corrupt, or of an unknown version.
        """
        stored = read_table(Path(path))
        try:
            return cls(**stored)
        except InputError as error:
            raise FileError(f"{path}: {error}") from None


def widths(formats: Sequence[Format]) -> Longs:
    """Return the bits that order formats from narrow to wide, int64[F].

    A kept precision adds no error, so it comes after every grid: keep-fp8 counts as 9 bits.

    Raises:
        InputError: a format is made up and has no bits.
    """
    for item in formats:
        if item.kind == "made-up":
            raise InputError(f"bits: {item} is made up and has none; build the table with formats")
    bits = [max(item.bits, 9) if item.kind == "keep" else item.bits for item in formats]
    return np.array(bits, dtype=np.int64)


def shares(units: Units, frequency: npt.ArrayLike) -> Floats:
    """Return checked shares of tokens, float64[U], read-only.

    Raises:
        InputError: the shape is wrong, or a value is not from 0 to 1.
    """
    values = frozen("frequency", frequency, np.float64, (len(units),))
    wrong = ~((values >= 0) & (values <= 1))
    if wrong.any():
        unit = int(wrong.argmax())
        raise InputError(
            f"frequency: {units.label(unit)} has {values[unit]}; a share of tokens is from 0 to 1"
        )
    return values


def _between(
    formats: Sequence[Format], at_least: float | None, at_most: float | None
) -> tuple[Bools, str]:
    """Return which formats are within the bounds, bool[F], and the wording for messages."""
    bits = widths(formats)
    allowed = np.ones(len(bits), dtype=np.bool_)
    said = []
    if at_least is not None:
        allowed &= bits >= at_least
        said.append(f"at least {at_least:g}")
    if at_most is not None:
        allowed &= bits <= at_most
        said.append(f"at most {at_most:g}")
    return allowed, f"has {' and '.join(said)} bits"


def storage(units: Units, formats: Sequence[Format]) -> Longs:
    """Return the bytes of each unit in each format, int64[U,F]; -1 where unknown."""
    stored, shape = storage_of_shapes(units, formats)
    return stored[shape]


def storage_of_shapes(units: Units, formats: Sequence[Format]) -> tuple[Longs, Ints]:
    """Return the bytes of each distinct shape in each format, and which shape each unit has.

    A model has few shapes, so this takes no memory to speak of, however many its units are.

    Returns:
        int64[S,F], -1 where unknown; int32[U].
    """
    shape = numbered(units.rows, units.cols)
    first = np.unique(shape, return_index=True)[1]
    rows, cols = units.rows[first], units.cols[first]
    stored = np.full((len(first), len(formats)), -1, dtype=np.int64)
    for column, item in enumerate(formats):
        if item.kind != "made-up":
            stored[:, column] = np.where(rows * cols > 0, item.nbytes(rows, cols), -1)
    return stored, shape


def _joined(first: Ints, second: Ints) -> Ints:
    """Return the connected components of two groupings of the same units, int32[U]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first = numbered(first)
    size = int(first.max()) + 1
    total = size + int(second.max()) + 1
    edges = coo_array((np.ones(len(first)), (first, second + size)), shape=(total, total))
    _, component = connected_components(edges, directed=False)
    return numbered(component[first])


def _plain(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        text = json.dumps(dict(provenance), allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InputError(f"provenance: not plain JSON ({error})") from None
    return MappingProxyType(json.loads(text))
