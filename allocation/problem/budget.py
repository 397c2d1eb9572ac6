"""Budgets: byte limits as people write them, resolved later with a table."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.table import CostTable
from bitknap.errors import InfeasibleError, InputError

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BY_NAME = {name.lower(): size for name, size in _UNITS.items()}
_EXAMPLES = "2.5bpw, 12GiB, 800MB, 40%"
_PATTERN = re.compile(r"(\d+\.?\d*|\.\d+)\s*([a-z%]+)(\s+units)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A limit on bytes; `limit(table)` turns it into numbers.

    Attributes:
        kind: the quantity limited: bits per weight of the units, bytes of the units, bytes of the
            whole checkpoint, or the checkpoint as a share of the source checkpoint.
        value: bits, bytes, bytes, or a fraction.
        text: the text that `str` returns and `parse` reads.
    """

    kind: Literal["bits", "bytes", "checkpoint", "share"]
    value: float
    text: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise InputError(f"budget {self.text!r}: must be above 0; examples: {_EXAMPLES}")

    @classmethod
    def bits(cls, bits: float) -> Budget:
        """Limit all bytes of the units to `bits` per weight."""
        return cls(kind="bits", value=bits, text=f"{bits}bpw")

    @classmethod
    def bytes(cls, count: int) -> Budget:
        """Limit the bytes of the units."""
        return cls(kind="bytes", value=count, text=f"{count}B units")

    @classmethod
    def checkpoint(cls, count: int) -> Budget:
        """Limit the bytes of the whole checkpoint on disk."""
        return cls(kind="checkpoint", value=count, text=f"{count}B")

    @classmethod
    def share(cls, fraction: float) -> Budget:
        """Limit the whole checkpoint to a fraction of the source checkpoint."""
        return cls(kind="share", value=fraction, text=f"{round(100 * fraction, 10):g}%")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "2.5bpw", "12GiB" (whole checkpoint), "1000B units" (units alone) or "40%".

        Raises:
            InputError: the text is none of these.
        """
        match = _PATTERN.fullmatch(text.strip().lower())
        unit = match[2] if match else ""
        if not match or unit not in {*_BY_NAME, "bpw", "%"} or (match[3] and unit not in _BY_NAME):
            raise InputError(f"budget {text!r} cannot be read; examples: {_EXAMPLES}")
        number = float(match[1])
        if unit == "bpw":
            return cls(kind="bits", value=number, text=text)
        if unit == "%":
            return cls(kind="share", value=number / 100, text=text)
        kind: Literal["bytes", "checkpoint"] = "bytes" if match[3] else "checkpoint"
        return cls(kind=kind, value=_in_bytes(match), text=text)

    def __str__(self) -> str:
        return self.text

    def limit(self, table: CostTable) -> Limit:
        """Return the limit "memory" on the bytes of the table's units.

        Raises:
            InputError: the table lacks a number that the budget refers to.
            InfeasibleError: the unquantized parts of the checkpoint already fill the budget.
        """
        bound, note = self._bound(table), ""
        if self.kind in ("checkpoint", "share"):
            note = f" beside {human(self._known(table, 'fixed_bytes'))} that is not quantized"
        return Limit(name="memory", weight=table.nbytes, bound=bound, unit="bytes", note=note)

    def _bound(self, table: CostTable) -> int:
        if self.kind == "bytes":
            return math.floor(self.value)
        if self.kind == "bits":
            if not table.units.has_shapes:
                raise InputError(f"budget {self}: the units have no shapes; use Budget.bytes")
            return math.floor(self.value * table.weights / 8)
        total = self.value
        if self.kind == "share":
            total *= self._known(table, "source_bytes")
        fixed = self._known(table, "fixed_bytes")
        if total < fixed:
            raise InfeasibleError(
                f"memory: the parts that are not quantized take {human(fixed)}, "
                f"limit is {human(total)}; raise the limit"
            )
        return math.floor(total) - fixed

    def _known(self, table: CostTable, key: str) -> int:
        value = table.provenance.get(key)
        if not isinstance(value, int):
            raise InputError(f"budget {self}: the table has no {key}; use bpw or Budget.bytes")
        return value


def parse_size(text: str) -> int:
    """Return the bytes of a text such as "12GiB" or "800MB".

    Raises:
        InputError: the text is not a size.
    """
    match = _PATTERN.fullmatch(text.strip().lower())
    if not match or match[2] not in _BY_NAME or match[3]:
        raise InputError(f"{text!r} is not a size; examples: 12GiB, 800MB, 4096B")
    return _in_bytes(match)


def _in_bytes(match: re.Match[str]) -> int:
    # int keeps whole bytes exact beyond 2**53.
    size = int(match[1]) if match[1].isdecimal() else float(match[1])
    return math.floor(size * _BY_NAME[match[2]])


def human(count: float) -> str:
    """Return bytes as people read them: "9.40 GiB", "312 B"."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if abs(count) >= _UNITS[name]:
            return f"{count / _UNITS[name]:.4g} {name}"
    return f"{count:.4g} B"
