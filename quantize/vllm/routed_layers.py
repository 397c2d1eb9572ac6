"""The routed experts of one layer, or one device's share of them, in the form that kernels read.

tensor parallelism   a device holds some rows of gate and up, and the same columns of down
expert parallelism   a device holds some of the experts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import ROLES
from bitknap.errors import InputError, ModelError
from bitknap.kernels.experts_table import ExpertsTable
from bitknap.quantization.packed.opened import PackedFolder
from bitknap.quantization.packed.tiled_bytes import experts_table
from bitknap.quantization.runtime.kernel_experts import check_formats
from bitknap.quantization.vllm.unit_parts import check_columns, tiles_of_part


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one device holds of a layer.

    Attributes:
        experts: numbers of its experts, in the order in which it numbers them itself.
        rank: which of `of` equal parts of each expert it holds.
        of: number of devices that share each expert.
    """

    experts: Sequence[int]
    rank: int = 0
    of: int = 1

    def range(self, size: int) -> range:
        """Return its part of `size` rows or columns."""
        return range(self.rank * size // self.of, (self.rank + 1) * size // self.of)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Some rows and columns of a unit."""

    unit: int
    rows: range
    cols: range


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedLayer:
    """One layer's routed experts in a packed checkpoint.

    Attributes:
        packed: the checkpoint.
        layer: number of the layer.
        units: units of each expert's matrix, block by block in row order, by projection.
    """

    packed: PackedFolder
    layer: int
    units: dict[str, dict[int, list[int]]]

    @classmethod
    def of(cls, packed: PackedFolder, layer: int) -> RoutedLayer | None:
        """Return a layer's routed experts, None if none of them is packed."""
        units = packed.plan.units
        which = np.flatnonzero((units.layer == layer) & (units.role == ROLES.index("routed")))
        found: dict[str, dict[int, list[int]]] = {}
        for unit in which.tolist():
            matrices = found.setdefault(units.projections[units.projection[unit]], {})
            matrices.setdefault(int(units.expert[unit]), []).append(unit)
        return cls(packed=packed, layer=layer, units=found) if found else None

    def check_kernels(self) -> None:
        """Raise unless kernels can run these experts.

        Raises:
            InputError: they cannot; says why.
        """
        if not {"up", "down"} <= set(self.units) <= {"gate", "up", "down"}:
            raise InputError(
                f"projections {', '.join(sorted(self.units))}: kernels take gate, up and down"
            )
        for matrices in self.units.values():
            of_all = [unit for units in matrices.values() for unit in units]
            check_formats({(self._format(unit), *self._shape(unit)) for unit in of_all})

    def check_share(self, share: Share) -> None:
        """Raise unless the checkpoint can be divided among devices in this way.

        Raises:
            ModelError: it cannot; names the first unit and the ways out.
        """
        for projection in self.units:
            self._parts(projection, share)

    def tables(self, share: Share, device: torch.device) -> dict[str, ExpertsTable]:
        """Return each projection's experts as one device holds them.

        Args:
            share: what the device holds.
            device: where the bytes go; they are converted there, one unit at a time.

        Raises:
            ModelError: the checkpoint cannot be divided in this way.
            FileError: a file has shrunk since it was opened.
        """
        return {projection: self._table(projection, share, device) for projection in self.units}

    def _table(self, projection: str, share: Share, device: torch.device) -> ExpertsTable:
        parts = self._parts(projection, share)
        streams = []
        for part in (part for some in parts for part in some):
            stream = self.packed.read_unit(part.unit).to(device)
            with device:
                cut = (part.rows, part.cols)
                shape, kind = self._shape(part.unit), self.packed.kind
                streams.append(tiles_of_part(stream, self._format(part.unit), shape, cut, kind))
        blocks = len(parts[0])
        formats = [self._format(part.unit) for some in parts for part in some]
        rows = sum(len(part.rows) for part in parts[0])
        return experts_table(torch.cat(streams), formats, rows, len(parts[0][0].cols), blocks)

    def _parts(self, projection: str, share: Share) -> list[list[_Part]]:
        """Return what a device holds of each of its experts, block by block."""
        experts = [self._parts_of(projection, expert, share) for expert in share.experts]
        lengths = {len(part.rows) for parts in experts for part in parts}
        if len(lengths) > 1 or len({len(parts) for parts in experts}) > 1:
            raise ModelError(
                f"layer {self.layer} {projection}: a device would hold row blocks of "
                f"{', '.join(map(str, sorted(lengths)))} rows, and kernels take blocks of one "
                f"length: {self._ways_out(share)}"
            )
        return experts

    def _parts_of(self, projection: str, expert: int, share: Share) -> list[_Part]:
        units = self.units[projection][expert]
        rows = sum(self._shape(unit)[0] for unit in units)
        cols = self._shape(units[0])[1]
        across = share.range(cols) if projection == "down" else range(cols)
        down = range(rows) if projection == "down" else share.range(rows)
        parts, begin = [], 0
        for unit in units:
            length = self._shape(unit)[0]
            inside = range(max(down.start - begin, 0), min(down.stop - begin, length))
            begin += length
            if inside:
                self._check_columns(unit, across, share)
                parts.append(_Part(unit=unit, rows=inside, cols=across))
        return parts

    def _check_columns(self, unit: int, across: range, share: Share) -> None:
        try:
            check_columns(self._format(unit), self._shape(unit)[1], across)
        except InputError as error:
            label = self.packed.plan.units.label(unit)
            raise ModelError(
                f"{label}: {self._format(unit).name} cannot be divided among {share.of} devices: "
                f"{error}: {self._ways_out(share)}"
            ) from None

    @staticmethod
    def _ways_out(share: Share) -> str:
        return (
            f"divide whole experts (expert parallelism), take fewer than {share.of} devices, or "
            "quantize with a group size that divides each device's part"
        )

    def _format(self, unit: int) -> Format:
        return self.packed.plan.format_of(unit)

    def _shape(self, unit: int) -> tuple[int, int]:
        units = self.packed.plan.units
        return int(units.rows[unit]), int(units.cols[unit])
