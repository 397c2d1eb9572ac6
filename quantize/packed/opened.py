"""Open a packed checkpoint: check its files against each other, and read its streams."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.arrays import Longs
from bitknap.disk.atomic import check_version, read_json
from bitknap.disk.json_shapes import fits
from bitknap.errors import FileError, ModelError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import Layout, View
from bitknap.quantization.packed.config import check_config, layout_of, plain_config
from bitknap.quantization.packed.convert_layout import unit_bytes
from bitknap.quantization.packed.dequantize import MOST_HALF, dequantize_into
from bitknap.quantization.packed.folder import (
    PLAN,
    SOURCE,
    VERSION,
    digest,
    is_packed,
    roles_of,
)
from bitknap.quantization.packed.outline import PREFIX, streams
from bitknap.quantization.source.checkpoint import DTYPES, Checkpoint
from bitknap.quantization.source.partial_reads import read_bytes
from bitknap.quantization.stacks.alignment import aligned
from bitknap.quantization.stacks.row_blocks import layout_for, whole_of


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedFolder:
    """A packed checkpoint whose headers, plan and source agree with each other; a `Source`.

    It reads as the checkpoint that it was made from, with its weights as the plan left them: one
    matrix at a time, decoded to float32 when it is read.

    Attributes:
        checkpoint: its tensors.
        replaced: dtype and shape of the tensors that streams replace.
        whole: the matrices in those tensors.
        layout: the units in those tensors; blocks of matrices where the plan cuts them.
        plan: the plan, with its units in the layout's order.
        kind: byte layout of the streams, "plain" or "tiles".
        nbytes: bytes of each unit in them, int64[U].
    """

    checkpoint: Checkpoint
    replaced: dict[str, tuple[str, tuple[int, ...]]]
    whole: Layout
    layout: Layout
    plan: BitPlan
    kind: str
    nbytes: Longs

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.checkpoint.folder

    @property
    def config(self) -> dict[str, Any]:
        """The `config.json` of the checkpoint that it was made from."""
        return plain_config(self.checkpoint.config)

    @property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name to dtype and shape of the tensors of the checkpoint that it was made from."""
        kept = {n: x for n, x in self.checkpoint.shapes.items() if not n.startswith(PREFIX)}
        return {**kept, **self.replaced}

    @property
    def fingerprint(self) -> str:
        """32 hex digits that tell this checkpoint from another, also of the same shapes."""
        return self.checkpoint.fingerprint

    def read(self, name: str) -> Tensor:
        """Return one tensor: as it is kept, or decoded to float32.

        The caller rounds decoded tensors to the source's dtype.

        Raises:
            InputError: there is no tensor of this name.
            FileError: a file has shrunk since it was opened.
        """
        if name not in self.replaced:
            return self.checkpoint.read(name)
        tensor = torch.empty(self.replaced[name][1])
        for unit in self._inside[name]:
            self._decode(unit, self.layout.views[unit].of(tensor))
        return tensor

    def read_matrix(self, view: View) -> Tensor:
        """Return one [out, in] matrix as `read` would, decoding little else.

        Raises:
            FileError: a file has shrunk since it was opened.
        """
        if view.tensor not in self.replaced:
            return self.checkpoint.read_matrix(view)
        units = self._blocks.get(view)
        if units is None:
            return view.of(self.read(view.tensor))
        rows = [int(self.plan.units.rows[unit]) for unit in units]
        matrix = torch.empty(sum(rows), int(self.plan.units.cols[units[0]]))
        for unit, part in zip(units, matrix.split(rows), strict=True):
            self._decode(unit, part)
        return matrix

    def read_ahead(self, names: Iterable[str]) -> None:
        """Let the system read tensors from the disk while something else is computed."""
        wanted = list(names)
        kept = [name for name in wanted if name not in self.replaced]
        units = [unit for name in wanted for unit in self._inside.get(name, ())]
        self.checkpoint.read_ahead({*kept, *(self._places[unit][0] for unit in units)})

    def read_unit(self, unit: int) -> Tensor:
        """Return the bytes of one unit of the plan as they are stored, uint8.

        Raises:
            FileError: a file has shrunk since it was opened.
        """
        name, start = self._places[unit]
        info = self.checkpoint.headers[name]
        return read_bytes(name, info, start, start + int(self.nbytes[unit]))

    def _decode(self, unit: int, out: Tensor) -> None:
        """Write a unit's weights, float32 [rows, cols], where they belong."""
        dequantize_into(out, self.read_unit(unit), self.plan.format_of(unit), self.kind)
        if self.replaced[self.layout.views[unit].tensor][0] == "F16":
            out.clamp_(-MOST_HALF, MOST_HALF)  # rounding may exceed the largest value

    @cached_property
    def _places(self) -> list[tuple[str, int]]:
        """The stream of each unit, and where in it the unit's bytes begin."""
        places = [("", 0)] * len(self.plan.units)
        for name, run in streams(self.plan.units).items():
            starts = np.cumsum(self.nbytes[run]) - self.nbytes[run]
            for unit, start in zip(run.tolist(), starts.tolist(), strict=True):
                places[unit] = name, start
        return places

    @cached_property
    def _inside(self) -> dict[str, list[int]]:
        """The units in each tensor that streams replace, in the order of their bytes."""
        inside: dict[str, list[int]] = {name: [] for name in self.replaced}
        for unit in np.concatenate(list(streams(self.plan.units).values())).tolist():
            inside[self.layout.views[unit].tensor].append(unit)
        return inside

    @cached_property
    def _blocks(self) -> dict[View, list[int]]:
        """The units that each matrix is cut into, in the order of their rows."""
        blocks: dict[View, list[int]] = {}
        for unit, matrix in enumerate(whole_of(self.layout.units, self.whole.units).tolist()):
            blocks.setdefault(self.whole.views[matrix], []).append(unit)
        return blocks


def open_packed(folder: Path) -> PackedFolder:
    """Read everything in a packed checkpoint except its tensors.

    Raises:
        FileError: a file is missing, truncated, corrupt or of an unknown version.
    """
    plan = BitPlan.load(folder / PLAN)
    replaced = source_shapes(folder)
    packed = Checkpoint.open(folder)
    check_config(packed.config, folder)
    kind = layout_of(packed.config, folder)
    whole = walk_headers(plain_config(packed.config), replaced, include=roles_of(plan.units))
    layout = layout_for(plan.units, whole)
    plan = aligned(plan, layout)
    nbytes = unit_bytes(plan, kind)
    for name, run in streams(plan.units).items():
        if name not in packed.headers:
            raise FileError(f"{folder}: tensor {name} is missing; write the checkpoint again")
        info, total = packed.headers[name], int(nbytes[run].sum())
        if (info.dtype, info.shape) != ("U8", (total,)):
            raise FileError(
                f"{folder}: tensor {name}: {info.dtype} {list(info.shape)}, the plan says U8 "
                f"[{total}]; write the checkpoint again"
            )
    return PackedFolder(
        checkpoint=packed,
        replaced=replaced,
        whole=whole,
        layout=layout,
        plan=plan,
        kind=kind,
        nbytes=nbytes,
    )


def open_weights(folder: Path) -> Checkpoint | PackedFolder:
    """Return the tensors of a checkpoint, plain or packed, to be read one by one.

    Raises:
        FileError: a file is missing, truncated, corrupt or of an unknown version.
        ModelError: tensors are quantized in a way that is not read.
    """
    return open_packed(folder) if is_packed(folder) else Checkpoint.open(folder)


def check_decoded(packed: PackedFolder) -> None:
    """Refuse kept tensors in fewer than 16 bits, which transformers would not decode.

    Raises:
        ModelError: there are some, as early versions of Bitknap wrote them.
    """
    if low := list(packed.checkpoint.low_bit):
        raise ModelError(
            f"{packed.checkpoint.folder}: {len(low)} tensors outside the planned matrices, such "
            f"as {low[0]}, have fewer than 16 bits, so they cannot stay packed; load with "
            "bitknap.load(folder, packed=False), or quantize the source again"
        )


def read_packed(folder: Path) -> tuple[BitPlan, dict[str, Tensor]]:
    """Return the plan of a packed checkpoint and its tensors under the source's names.

    Quantized tensors are dequantized to float32; the caller rounds them to the source's dtype.

    Raises:
        FileError: a file is missing, truncated, corrupt or of an unknown version.
    """
    packed = open_packed(folder)
    return packed.plan, {name: packed.read(name) for name in packed.shapes}


def source_shapes(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of the tensors that streams replace; the plan must be as written."""
    path = folder / SOURCE
    header = read_json(path)
    if not isinstance(header, dict):
        raise FileError(f"{path}: not a JSON object; write the checkpoint again")
    check_version(header, "bitknap.source", VERSION, path)
    if header.get("plan") != digest(folder / PLAN):
        raise FileError(
            f"{folder / PLAN}: changed since the checkpoint was written; a plan cannot be edited "
            "there, quantize the source with the other plan"
        )
    tensors = header.get("tensors")
    if not isinstance(tensors, dict) or not all(fits(x, [str, [int]]) for x in tensors.values()):
        raise FileError(f"{path}: tensors: must give the dtype and shape of each name")
    shapes = {name: (dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
    if unknown := {dtype for dtype, _ in shapes.values()} - set(DTYPES):
        raise FileError(f"{path}: tensors: dtype {min(unknown)!r} is not known")
    return shapes
