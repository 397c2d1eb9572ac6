"""The pieces of a folder for another runtime: kept tensors, and units in a runtime's own form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.errors import MismatchError
from bitknap.quantization.packed import work_pieces
from bitknap.quantization.packed.shards import Place
from bitknap.quantization.packed.work_pieces import Piece, Span
from bitknap.quantization.packed.writer import BY_RTN
from bitknap.quantization.rounding.grid import Quantized
from bitknap.quantization.source.safetensors_header import DTYPES
from bitknap.quantization.stacks.grouping import plan_pieces
from bitknap.quantization.stacks.reading import read_stored
from bitknap.quantization.targets.target import ExportJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """Where one unit goes.

    Attributes:
        name: the runtime's name of the module whose weight it is.
        index: its place among the experts that the module stacks.
        count: number of these; 0 if the module holds one matrix.
    """

    name: str
    index: int = 0
    count: int = 0


class Form(Protocol):
    """How a runtime stores one matrix: some tensors, by the ends of their names."""

    def shapes(
        self, format: Format, rows: int, cols: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype (as safetensors spells it) and shape of each tensor of one matrix."""
        ...

    def parts(self, matrix: Quantized) -> dict[str, Tensor]:
        """Return the tensors of one matrix."""
        ...

    def values(self, parts: Mapping[str, Tensor], format: Format) -> Tensor:
        """Return the weights that the tensors stand for, float32 [rows, cols]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderWork:
    """Makes the bytes of a folder.

    Attributes:
        job: the model, the plan and the rounding.
        form: how units are stored.
        modules: where each unit goes, in the plan's order.
        kept: the source's name of each tensor that is copied, to its name in the folder.
        places: where each tensor begins, by its name in the folder.
    """

    job: ExportJob
    form: Form
    modules: Sequence[Module]
    kept: Mapping[str, str]
    places: Mapping[str, Place]

    def pieces(self) -> list[Piece]:
        """Return all pieces, in the order in which they lie in the source's files."""
        job, units = self.job, self.job.plan.units
        pieces: list[Piece] = [*work_pieces.kept_pieces(job.source, self.kept)]
        pieces += [
            work_pieces.Rounded(which, format, 0, int(units.rows[which[0]]))
            for which, format in plan_pieces(job.plan)
        ]
        return sorted(pieces, key=lambda piece: work_pieces.position(job.source, job.layout, piece))

    def stamps(self, pieces: Sequence[Piece]) -> list[str]:
        """Return, for each piece, a digest that changes with the files that it is read from."""
        layout = self.job.layout
        return work_pieces.stamps(
            self.job.source, [work_pieces.read_from(layout, piece) for piece in pieces]
        )

    def read(self, piece: Piece) -> Tensor:
        """Return a piece's input: bytes, or weights float32 [n, rows, cols].

        Raises:
            ModelError: a weight is NaN or infinite.
        """
        if isinstance(piece, work_pieces.Rounded):
            return read_stored(self.job.layout, piece.which, self.job.source)
        return work_pieces.read_kept(self.job.source, piece)

    def make(self, piece: Piece, given: Tensor) -> list[Span]:
        """Return the bytes that a piece writes, from what `read` gave."""
        if isinstance(piece, work_pieces.Rounded):
            matrices = self.rounded(piece.which, piece.format, given)
            return [
                span
                for unit, matrix in zip(piece.which.tolist(), matrices, strict=True)
                for span in self._spans(unit, matrix)
            ]
        places = {name: self.places[kept] for name, kept in self.kept.items()}
        return [work_pieces.kept_span(places, piece, given)]

    def rounded(self, which: np.ndarray, format: Format, weights: Tensor) -> list[Quantized]:
        """Return equally shaped units of one format, rounded.

        Args:
            which: the units, int64 [n].
            format: their format.
            weights: their weights, float32 [n, rows, cols].
        """
        how = self.job.rounded or BY_RTN
        known = how.inputs(which) if how.inputs and how.rounding.needs_inputs else None
        stack = how.rounding.quantize(weights.to(how.device), format, known)
        assert isinstance(stack, Quantized), format  # `check` lets grids alone through
        rows = weights.shape[1]
        return [stack.rows(n * rows, (n + 1) * rows) for n in range(len(which))]

    def parts_of(self, unit: int) -> Iterator[tuple[str, str, str, tuple[int, ...], int]]:
        """Yield the tensors of one unit: end and whole name, dtype, shape, and first byte."""
        module, units = self.modules[unit], self.job.plan.units
        shape = int(units.rows[unit]), int(units.cols[unit])
        for end, (dtype, sizes) in self.form.shapes(self.job.plan.format_of(unit), *shape).items():
            start = module.index * math.prod(sizes) * DTYPES[dtype].itemsize
            yield end, f"{module.name}.{end}", dtype, sizes, start

    def _spans(self, unit: int, matrix: Quantized) -> Iterator[Span]:
        made = self.form.parts(matrix)
        for end, name, dtype, sizes, start in self.parts_of(unit):
            tensor = made[end].contiguous().cpu()
            data = tensor.view(torch.uint8).reshape(-1)
            if len(data) != math.prod(sizes) * DTYPES[dtype].itemsize:
                raise MismatchError(
                    f"{name}: {len(data):,} bytes, its shape says {list(sizes)} of {dtype}; report "
                    "this as a bug"
                )
            file, begin = self.places[name]
            yield Span(Place(file, begin + start), data)
