"""The plan: one format for every unit, with its exact bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from bitknap.allocation.plans.plan_file import read_plan, write_plan
from bitknap.allocation.problem.arrays import Ints, Longs, frozen
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import storage_of_shapes
from bitknap.allocation.problem.units import Units
from bitknap.errors import FileError, InputError

# Keys of the table's provenance that a plan keeps.
CARRIED = ("estimator", "method", "profile", "rewritten", "row_blocks", "seed", "text")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BitPlan:
    """One format for every unit.

    Attributes:
        units: the units.
        formats: the formats available.
        choice: index into `formats`, int32[U].
        nbytes: stored bytes, int64[U]; derived from the formats when not given, and equal to
            `Format.nbytes` wherever that is defined.
        model: fingerprint of the model, or "".
        header: how the plan was made: solver, objective, bound, seed, profile, …; JSON values.
    """

    units: Units
    formats: tuple[Format, ...]
    choice: Ints
    nbytes: Longs = None  # type: ignore[assignment]
    model: str = ""
    header: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.units),)
        choice = frozen("choice", self.choice, np.int32, shape)
        wrong = (choice < 0) | (choice >= len(self.formats))
        if wrong.any():
            unit = int(wrong.argmax())
            raise InputError(
                f"choice[{unit}]: {choice[unit]} is outside 0 to {len(self.formats) - 1}"
            )
        sizes, kind = storage_of_shapes(self.units, self.formats)
        stored = sizes[kind, choice]
        nbytes = frozen("nbytes", stored if self.nbytes is None else self.nbytes, np.int64, shape)
        wrong = (nbytes < 0) | ((stored >= 0) & (stored != nbytes))
        if wrong.any():
            unit = int(wrong.argmax())
            where = f"{self.units.label(unit)} {self.formats[choice[unit]]}"
            known = f"the format stores {stored[unit]}" if stored[unit] >= 0 else "give nbytes"
            raise InputError(f"nbytes: {where} has {nbytes[unit]}; {known}")
        values: dict[str, Any] = {"formats": tuple(self.formats), "choice": choice}
        values |= {"nbytes": nbytes, "header": MappingProxyType(dict(self.header))}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_choice(
        cls,
        units: Units,
        formats: Sequence[Format],
        choice: npt.ArrayLike,
        *,
        nbytes: npt.ArrayLike | None = None,
        model: str = "",
        header: Mapping[str, Any] | None = None,
    ) -> BitPlan:
        """Build a plan from the index of each unit's format.

        Raises:
            InputError: an index is out of range, or the bytes contradict the formats.
        """
        given: Any = nbytes
        return cls(
            units=units,
            formats=tuple(formats),
            choice=np.asarray(choice),
            nbytes=given,
            model=model,
            header=header or {},
        )

    @classmethod
    def uniform(cls, units: Units, format: Format, model: str = "") -> BitPlan:
        """Give every unit the same format."""
        header = {"solver": "uniform"}
        zeros = np.zeros(len(units), dtype=np.int32)
        return cls.from_choice(units, (format,), zeros, model=model, header=header)

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all units."""
        return int(self.nbytes.sum())

    @property
    def bpw(self) -> float:
        """Bits per weight with scales and zeros; NaN when shapes are unknown."""
        weights = int(self.units.numel.sum())
        return 8 * self.total_bytes / weights if weights else float("nan")

    @property
    def totals(self) -> dict[str, float | int | None]:
        """Bytes, weights, and bits per weight (None when shapes are unknown)."""
        weights = int(self.units.numel.sum())
        return {
            "bytes": self.total_bytes,
            "weights": weights,
            "bits_per_weight": self.bpw if weights else None,
        }

    def format_of(self, unit: int) -> Format:
        """Return the format of one unit."""
        return self.formats[int(self.choice[unit])]

    def save(self, path: str | Path) -> None:
        """Write the plan atomically as JSON, one line per unit, sorted by unit."""
        stored = {item.name: getattr(self, item.name) for item in fields(self)}
        write_plan(stored, self.totals, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> BitPlan:
        """Read a plan and check its bytes and totals; its units are in the file's order.

        Raises:
            FileError: the file is missing, corrupt, of an unknown version, or contradicts itself.
        """
        stored, totals = read_plan(Path(path))
        try:
            plan = cls.from_choice(**stored)
        except InputError as error:
            raise FileError(f"{path}: units: {error}") from None
        for key, value in plan.totals.items():
            if totals.get(key) != value:
                raise FileError(
                    f"{path}: totals.{key}: {totals.get(key)!r}, but the units add up to {value}; "
                    "make the plan again"
                )
        return plan
