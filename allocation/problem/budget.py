"""Budgets: byte limits as people write them, resolved later with a table."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitknap.allocation.problem.arrays import Longs, numbered
from bitknap.allocation.problem.byte_sizes import BY_NAME, SIZE, human, in_bytes, parse_size
from bitknap.allocation.problem.checks import whole
from bitknap.allocation.problem.device_memory import Device
from bitknap.allocation.problem.limit import Limit
from bitknap.allocation.problem.serving import KEY, Serving
from bitknap.allocation.problem.table import CostTable
from bitknap.errors import InfeasibleError, InputError

__all__ = ["Budget", "human", "parse_size"]

_EXAMPLES = "2.5bpw, 12GiB, 800MB, 40%, 24GiB@32768"
# A device's memory, its context, and the number of sequences if it is not 1.
_DEVICE = re.compile(r"(.+)@(\d+)(?:x(\d+))?(\s+on\s+cpu)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A limit on bytes; `limit(table)` turns it into numbers.

    Attributes:
        kind: the quantity limited: bits per weight of the units, bytes of the units, bytes of the
            whole checkpoint, the checkpoint as a share of the source checkpoint, or the memory of
            a device that generates with the model.
        value: bits, bytes, bytes, a fraction, or bytes.
        text: the text that `str` returns and `parse` reads.
        serves: the device; None for the other kinds.
        needs: what the model needs there beside its weights; what the table says when not given.
    """

    kind: Literal["bits", "bytes", "checkpoint", "share", "device"]
    value: float
    text: str
    serves: Device | None = None
    needs: Serving | None = None

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
    def device(
        cls,
        size: int | str,
        context: int,
        batch: int = 1,
        *,
        kind: Literal["gpu", "cpu"] = "gpu",
        needs: Serving | None = None,
    ) -> Budget:
        """Limit all that a device holds while it generates: weights, cache, activations, runtime.

        Args:
            size: the device's memory, bytes or a text such as "24GiB".
            context: tokens of each sequence, prompt and answer together.
            batch: number of sequences at once.
            kind: "gpu", where kernels run packed experts, or "cpu", a process with
                `load(packed=True)`.
            needs: `bitknap.serving(model)`, for a table that does not say what its model needs.

        Raises:
            InputError: a value is no size or no whole number above 0.
        """
        count = parse_size(size) if isinstance(size, str) else whole("size", size, 1)
        device = Device(
            size=count,
            context=whole("context", context, 1),
            batch=whole("batch", batch, 1),
            kind=kind,
        )
        shown = f"{size if isinstance(size, str) else f'{size}B'}@{context}"
        shown += (f"x{batch}" if batch > 1 else "") + (" on cpu" if kind == "cpu" else "")
        return cls(kind="device", value=count, text=shown, serves=device, needs=needs)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "2.5bpw", "12GiB" (whole checkpoint), "1000B units" (units alone) or "40%".

        "24GiB@32768" is a device of 24 GiB that generates up to 32768 tokens; "24GiB@32768x8"
        generates 8 sequences at once.

        Raises:
            InputError: the text is none of these.
        """
        if at := _DEVICE.fullmatch(text.strip()):
            size, context, batch, cpu = at.groups()
            return cls.device(
                size.strip(), int(context), int(batch or 1), kind="cpu" if cpu else "gpu"
            )
        match = SIZE.fullmatch(text.strip().lower())
        unit = match[2] if match else ""
        if not match or unit not in {*BY_NAME, "bpw", "%"} or (match[3] and unit not in BY_NAME):
            raise InputError(f"budget {text!r} cannot be read; examples: {_EXAMPLES}")
        number = float(match[1])
        if unit == "bpw":
            return cls(kind="bits", value=number, text=text)
        if unit == "%":
            return cls(kind="share", value=number / 100, text=text)
        kind: Literal["bytes", "checkpoint"] = "bytes" if match[3] else "checkpoint"
        return cls(kind=kind, value=in_bytes(match), text=text)

    def __str__(self) -> str:
        return self.text

    def limit(self, table: CostTable) -> Limit:
        """Return the limit "memory" on the bytes of the table's units.

        Raises:
            InputError: the table lacks a number that the budget refers to.
            InfeasibleError: the unquantized parts of the checkpoint already fill the budget.
        """
        if self.serves is not None:
            return self._fit(table, self.serves)
        bound, note = self._bound(table), ""
        if self.kind in ("checkpoint", "share"):
            note = f" beside {human(self._known(table, 'fixed_bytes'))} that is not quantized"
        return Limit(name="memory", weight=table.nbytes, bound=bound, unit="bytes", note=note)

    def entries(self, table: CostTable) -> dict[str, int]:
        """Return what else a device has to hold, in bytes by name; empty for other budgets.

        Raises:
            InputError: the table does not say what its model needs, or the context is too long.
        """
        if self.serves is None:
            return {}
        return self.serves.entries(
            self._serving(table), self._known(table, "fixed_bytes"), table.units
        )

    def ledger(self, table: CostTable, choice: npt.ArrayLike) -> dict[str, int]:
        """Return all that a device holds with a plan, bytes by name; empty for other budgets.

        "left" is what remains of the "device".

        Args:
            table: the table that the plan was made from.
            choice: format of each unit, int[U].
        """
        if self.serves is None:
            return {}
        sizes = self.serves.unit_bytes(
            self._serving(table), table.units, table.formats, table.nbytes
        )
        units = int(sizes[np.arange(len(sizes)), np.asarray(choice)].sum())
        entries = {"weights of units": units, **self.entries(table)}
        left = self.serves.size - sum(entries.values())
        return {**entries, "left": left, "device": self.serves.size}

    def _fit(self, table: CostTable, device: Device) -> Limit:
        """Return the limit on the units' bytes in a device's memory."""
        serving, kept = self._serving(table), self._known(table, "fixed_bytes")
        sizes = device.unit_bytes(serving, table.units, table.formats, table.nbytes)
        bound = device.room(serving, kept, table.units, _least(table, sizes))
        rest = human(device.size - bound)
        note = f" beside {rest} for what is not quantized, cache, activations and runtime"
        return Limit(name="memory", weight=sizes, bound=bound, unit="bytes", note=note)

    def _serving(self, table: CostTable) -> Serving:
        if self.needs is not None:
            return self.needs
        if KEY not in table.provenance:
            raise InputError(
                f"budget {self}: the table does not say what its model needs beside weights; "
                "estimate again, give a budget such as 12GiB, or in Python what "
                "bitknap.serving(MODEL) returns"
            )
        return Serving.from_dict(table.provenance[KEY])

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


def _least(table: CostTable, sizes: Longs) -> int:
    """Return the bytes of the smallest plan, units that are tied together in one format."""
    rows = np.arange(len(sizes)) if table.ties is None else numbered(table.ties)
    count = int(rows.max()) + 1
    summed = [np.bincount(rows, weights=column, minlength=count) for column in sizes.T]
    forbidden = [
        np.bincount(rows, weights=~np.isfinite(column), minlength=count) for column in table.cost.T
    ]
    allowed = np.where(np.stack(forbidden) > 0, np.inf, np.stack(summed)).min(axis=0)
    return int(allowed[np.isfinite(allowed)].sum())
