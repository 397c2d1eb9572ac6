"""Cells of a comparison: the result of one strategy at one budget, and its line in the journal."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitknap.allocation.problem.arrays import Floats
from bitknap.errors import BitknapError, FileError, InfeasibleError

OK, UNREACHABLE, FAILED = "ok", "unreachable", "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The result of one strategy at one budget.

    Attributes:
        strategy: its name.
        budget: bits per weight.
        status: "ok", "unreachable" or "failed".
        values: its values in the report, JSON values.
        kl: KL by window, [W]; empty without a plan.
        ours: KL of Bitknap's plan at the same bytes, [W].
        seconds: time that it took.
    """

    strategy: str
    budget: float
    status: str
    values: Mapping[str, Any]
    kl: Floats = field(default_factory=lambda: np.zeros(0))
    ours: Floats = field(default_factory=lambda: np.zeros(0))
    seconds: float = 0.0

    def line(self) -> dict[str, Any]:
        """Return the cell as JSON values."""
        fields = {
            "strategy": self.strategy,
            "budget": self.budget,
            "status": self.status,
            "values": dict(self.values),
            "kl": self.kl.tolist(),
            "ours": self.ours.tolist(),
            "seconds": self.seconds,
        }
        return {**fields, "sum": _sum(fields)}

    @classmethod
    def of_line(cls, line: bytes) -> Cell:
        """Return the cell of a line, the inverse of `line`.

        Raises:
            ValueError: the line is damaged.
        """
        fields: dict[str, Any] = json.loads(line)
        if not isinstance(fields, dict) or fields.pop("sum", None) != _sum(fields):
            raise ValueError("damaged")
        for name in ("kl", "ours"):
            fields[name] = np.array(fields[name], dtype=np.float64)
        return cls(**fields)


def _sum(values: Mapping[str, Any]) -> int:
    """Return the CRC-32 of JSON values."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def cells_of(journal: Path, lines: Sequence[bytes]) -> Iterator[Cell]:
    """Yield the cells of a journal, from the lines after its header.

    Raises:
        FileError: a line is damaged.
    """
    for number, line in enumerate(lines, start=2):
        try:
            yield Cell.of_line(line)
        except (ValueError, RecursionError):
            raise FileError(
                f"{journal}: line {number} is damaged; delete {journal.parent} to start anew"
            ) from None


def failure(name: str, budget: float, error: Exception) -> Cell:
    """Return the cell of a strategy that failed, with its reason."""
    status = UNREACHABLE if isinstance(error, InfeasibleError) else FAILED
    kind = "" if isinstance(error, BitknapError) else f"{type(error).__name__}: "
    return Cell(strategy=name, budget=budget, status=status, values={"reason": f"{kind}{error}"})
