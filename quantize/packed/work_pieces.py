"""The work of writing a packed checkpoint, cut into pieces of bounded size.

A piece is a range of a kept tensor's bytes, or some rows or experts of one that is decoded, or some
units of one stack and one format, or a block of one large unit's rows. Its bytes go to fixed places
in the output, so that pieces can be done in any order and repeated. They are numbered in the order
of the source's files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.format import Format
from bitknap.errors import BitknapError, ModelError
from bitknap.kernels.layout.plain_codes import packed_bytes
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.packed.plain_bytes import encode
from bitknap.quantization.packed.shards import Place
from bitknap.quantization.rounding.grid import Quantized
from bitknap.quantization.rounding.magnitude import exponents_of, peaks
from bitknap.quantization.rounding.rounding import Rounding
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.devices import CPU
from bitknap.quantization.source.partial_reads import read_bytes
from bitknap.quantization.source.safetensors_header import DTYPES, TensorInfo
from bitknap.quantization.stacks.grouping import PIECE, plan_pieces
from bitknap.quantization.stacks.quantize_plan import Watched
from bitknap.quantization.stacks.reading import all_finite, read_stored

# Bytes copied at a time; a multiple of every dtype's width.
COPY = 1 << 24
# Bytes of a kept tensor decoded at a time, as float32.
DECODE = 1 << 25
# In every bit width, only multiples of 8 rows are sure to end at a byte boundary.
_ROWS = 8
# Codes packed at a time: packing takes 16 more bytes per code.
_CODES = 1 << 20


class Span(NamedTuple):
    """Bytes, uint8, and where they go."""

    place: Place
    data: Tensor


class Copied(NamedTuple):
    """Bytes start .. stop - 1 of a kept tensor."""

    name: str
    start: int
    stop: int


class Decoded(NamedTuple):
    """Elements first .. last - 1 of the first dimension of a kept tensor stored in fewer bits."""

    name: str
    first: int
    last: int


class Rounded(NamedTuple):
    """Output rows first .. last - 1 of units of one stack, all in one format."""

    which: np.ndarray
    format: Format
    first: int
    last: int


Piece = Copied | Decoded | Rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All the work, and the inputs that it needs.

    Attributes:
        source: the checkpoint that is read.
        layout: its units.
        plan: the format of each unit, in the layout's order.
        kept: tensors that are copied, or decoded if they are stored in fewer than 16 bits.
        places: where kept tensors begin in the output.
        unit_places: where each unit's bytes begin in the output.
        rounding: how units are rounded.
        inputs: statistics of units' inputs, for rounding methods that need them.
        device: where units are rounded and their bits are packed.
        exponents: exponents (`magnitude`) of units cut into blocks of rows, as they become known.
    """

    source: Checkpoint
    layout: Layout
    plan: BitPlan
    kept: Mapping[str, TensorInfo]
    places: Mapping[str, Place]
    unit_places: tuple[Place, ...]
    rounding: Rounding
    inputs: Watched | None
    device: torch.device = CPU
    exponents: dict[int, int] = field(default_factory=dict)

    def pieces(self) -> list[Piece]:
        """Return the pieces, in the order in which they lie in the source's files."""
        pieces: list[Piece] = [*kept_pieces(self.source, self.kept), *self._rounded()]
        return sorted(pieces, key=lambda piece: position(self.source, self.layout, piece))

    def _rounded(self) -> Iterator[Rounded]:
        for which, format in plan_pieces(self.plan):
            rows, cols = (int(x[which[0]]) for x in (self.plan.units.rows, self.plan.units.cols))
            step = rows
            if 4 * rows * cols > PIECE and not self._is_whole(which, format):
                step = _blocks_of(PIECE // (4 * cols))
            for first in range(0, rows, step):
                yield Rounded(which, format, first, min(rows, first + step))

    def _is_whole(self, which: np.ndarray, format: Format) -> bool:
        """Return whether a large matrix cannot be worked on in blocks of rows."""
        if format.kind == "keep":
            return self.layout.views[which[0]].tensor in self.source.low_bit
        return self.rounding.needs_inputs  # other methods round row by row

    def stamps(self, pieces: Sequence[Piece]) -> list[str]:
        """Return, for each piece, a digest that changes with the files that it is read from."""
        return stamps(self.source, [read_from(self.layout, piece) for piece in pieces])

    def read(self, piece: Piece) -> Tensor:
        """Return a piece's input: bytes (of each unit), or weights float32 [n, rows, cols].

        Raises:
            ModelError: a weight is NaN or infinite.
            FileError: a file has shrunk since it was opened.
        """
        if not isinstance(piece, Rounded):
            return read_kept(self.source, piece)
        if piece.format.kind == "keep":
            return torch.stack([self._kept_bytes(unit, piece) for unit in piece.which])
        rows = slice(piece.first, piece.last)
        if self._is_part(piece):
            self._find_exponents(piece)
        return read_stored(self.layout, piece.which, self.source, rows)

    def make(self, piece: Piece, given: Tensor) -> list[Span]:
        """Return the bytes that a piece writes, from what `read` gave."""
        if not isinstance(piece, Rounded):
            return [kept_span(self.places, piece, given)]
        if piece.format.kind == "keep":
            return self._kept_spans(piece, given)
        given = given.to(self.device)
        asks = self.inputs is not None and self.rounding.needs_inputs
        known = self.inputs(piece.which) if self.inputs is not None and asks else None
        if self._is_part(piece):
            exponents = torch.tensor([self.exponents[int(u)] for u in piece.which])
            quantized = self.rounding.quantize(given, piece.format, known, exponents.int())
        else:
            quantized = self.rounding.quantize(given, piece.format, known)
        assert isinstance(quantized, Quantized), quantized.format  # `_check_kept` of the writer
        height, spans = piece.last - piece.first, []
        for place, unit in enumerate(piece.which):
            part = quantized.rows(place * height, (place + 1) * height)
            spans += self._sections(int(unit), part, piece.first)
        return spans

    def _is_part(self, piece: Rounded) -> bool:
        """Return whether a piece covers only some of the rows of its units."""
        return piece.last - piece.first < int(self.plan.units.rows[piece.which[0]])

    def _find_exponents(self, piece: Rounded) -> None:
        """Find a matrix's exponent from its largest weight, reading it block by block."""
        (unit,) = map(int, piece.which)
        if unit in self.exponents:
            return
        rows, cols = int(self.plan.units.rows[unit]), int(self.plan.units.cols[unit])
        step = _blocks_of(PIECE // (4 * cols))
        blocks = (slice(at, min(rows, at + step)) for at in range(0, rows, step))
        largest = [
            peaks(read_stored(self.layout, piece.which, self.source, block)) for block in blocks
        ]
        self.exponents[unit] = int(exponents_of(torch.cat(largest).amax(0, keepdim=True)))

    def _kept_bytes(self, unit: int, piece: Rounded) -> Tensor:
        view = self.layout.views[unit]
        rows = slice(piece.first, piece.last)
        if view.tensor in self.source.low_bit:
            read_stored(self.layout, np.array([unit]), self.source, rows)  # raises if not finite
            return self.source.kept(view)
        matrix = self.source.read_matrix(view.rows(piece.first, piece.last)).contiguous()
        check_finite(view.tensor, matrix)
        return matrix.view(torch.uint8).reshape(-1)

    def _kept_spans(self, piece: Rounded, given: Tensor) -> list[Span]:
        spans = []
        for unit, data in zip(piece.which, given, strict=True):
            whole = len(data) * int(self.plan.units.rows[unit]) // (piece.last - piece.first)
            self._check(unit, whole)
            file, start = self.unit_places[unit]
            start += whole * piece.first // int(self.plan.units.rows[unit])
            spans.append(Span(Place(file, start), data))
        return spans

    def _sections(self, unit: int, part: Quantized, first: int) -> list[Span]:
        """Return one unit's rows from `first` on, section by section of its stream."""
        format, cols, height = part.format, part.grid.cols, len(part.codes)
        rows = int(self.plan.units.rows[unit])
        whole, before = sections(format, rows, cols), sections(format, first, cols)
        sizes = sections(format, height, cols)
        self._check(unit, sum(whole))
        made = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        step = _blocks_of(_CODES // cols)
        for start in range(0, height, step):
            stop = min(height, start + step)
            some = part.rows(start, stop)
            if first + start:  # the first rows hold the exponent
                some = some.times_power(None)
            parts = encode(some).split(sections(format, stop - start, cols))
            for into, data, at in zip(made, parts, sections(format, start, cols), strict=True):
                into[at : at + len(data)] = data
        file, begin = self.unit_places[unit]
        starts = [begin + sum(whole[:i]) + before[i] for i in range(len(whole))]
        return [Span(Place(file, s), m) for s, m in zip(starts, made, strict=True) if len(m)]

    def _check(self, unit: int, size: int) -> None:
        if size != self.plan.nbytes[unit]:
            raise BitknapError(
                f"{self.plan.units.label(unit)}: {size} bytes, the plan says "
                f"{self.plan.nbytes[unit]}"
            )


def kept_pieces(source: Checkpoint, names: Iterable[str]) -> Iterator[Copied | Decoded]:
    """Yield the pieces of tensors that are copied, or decoded if they are stored in few bits."""
    for name in names:
        if name in source.low_bit:
            for first, last in slabs(source, name):
                yield Decoded(name, first, last)
            continue
        info = source.headers[name]
        size = info.stop - info.start
        for start in range(0, size, COPY):
            yield Copied(name, start, min(size, start + COPY))


def read_kept(source: Checkpoint, piece: Copied | Decoded) -> Tensor:
    """Return the bytes of a piece of a kept tensor, uint8; raises like `Work.read`."""
    if isinstance(piece, Copied):
        return read_finite(piece.name, source.headers[piece.name], piece.start, piece.stop)
    return decode_finite(source, piece)


def kept_span(places: Mapping[str, Place], piece: Copied | Decoded, given: Tensor) -> Span:
    """Return where the bytes of a piece of a kept tensor go.

    Args:
        places: where each tensor begins in the output, by its name in the source.
        piece: the piece.
        given: its bytes.
    """
    file, start = places[piece.name]
    if isinstance(piece, Copied):
        return Span(Place(file, start + piece.start), given)
    before = len(given) // (piece.last - piece.first) * piece.first
    return Span(Place(file, start + before), given)


def position(source: Checkpoint, layout: Layout, piece: Piece) -> tuple[Path, int, int]:
    """Return what orders pieces as they lie in the source's files."""
    if isinstance(piece, Copied):
        info = source.headers[piece.name]
        return info.file, info.start + piece.start, 0
    if isinstance(piece, Decoded):
        info = source.headers[piece.name]
        stride = (info.stop - info.start) // info.shape[0]
        return info.file, info.start + piece.first * stride, 0
    view = layout.views[piece.which[0]]
    info = source.headers[view.tensor]
    stride = (info.stop - info.start) // (view.parts or info.shape[0])
    begin = info.start + (view.index or 0) * stride
    return info.file, begin, int(piece.which[0]) + piece.first


def read_from(layout: Layout, piece: Piece) -> set[str]:
    """Return the names of the source's tensors that a piece is read from."""
    if isinstance(piece, Rounded):
        return {layout.views[unit].tensor for unit in piece.which}
    return {piece.name}


def stamps(source: Checkpoint, pieces: Iterable[Collection[str]]) -> list[str]:
    """Return, for each piece, a digest that changes with the files that it is read from.

    Args:
        source: the checkpoint.
        pieces: the names of the tensors that each piece is read from.
    """
    known: dict[Path, list[Any]] = {}
    digests = []
    for names in pieces:
        files = {info.file for info in source.stored(names).values()}
        for file in files - known.keys():
            stat = file.stat()
            known[file] = [file.name, stat.st_size, stat.st_mtime_ns]
        text = json.dumps([known[file] for file in sorted(files)])
        digests.append(hashlib.sha256(text.encode()).hexdigest()[:16])
    return digests


def sections(format: Format, rows: int, cols: int) -> list[int]:
    """Return the bytes of codes, scales, shares and zeros of a unit (see `plain_bytes`)."""
    total = int(format.nbytes(rows, cols))
    even = int(replace(format, symmetric=True).nbytes(rows, cols))
    codes = packed_bytes(rows * cols, format.bits)
    scales = even - codes if format.metadata == "fp16" else 2 * rows
    return [codes, scales, even - codes - scales, total - even]


def read_finite(name: str, info: TensorInfo, start: int, stop: int) -> Tensor:
    """Return bytes of a stored tensor, uint8.

    Raises:
        ModelError: a weight among them is NaN or infinite.
        FileError: the file has shrunk since it was opened, or torch lacks the dtype.
    """
    data = read_bytes(name, info, start, stop)
    check_finite(name, data.view(DTYPES[info.dtype]))
    return data


def slabs(source: Checkpoint, name: str) -> Iterator[tuple[int, int]]:
    """Yield first and last + 1 of runs of a low-bit tensor's first dimension, to be decoded."""
    shape = source.headers[name].shape
    step = max(1, DECODE // (4 * max(1, math.prod(shape[1:]))))
    for first in range(0, shape[0], step):
        yield first, min(shape[0], first + step)


def decode_finite(source: Checkpoint, piece: Decoded) -> Tensor:
    """Return the bytes of a part of a low-bit tensor, decoded to bfloat16, uint8.

    Raises:
        ModelError: a weight among them is NaN or infinite.
        FileError: the file has shrunk since it was opened.
    """
    weights = source.read_slabs(piece.name, piece.first, piece.last).contiguous()
    check_finite(piece.name, weights)
    return weights.view(torch.uint8).reshape(-1)


def check_finite(name: str, values: Tensor) -> None:
    """Raise ModelError if a floating-point value is NaN or infinite."""
    if values.is_floating_point():
        known = values if values.dtype.itemsize > 1 else values.float()
        if not all_finite(known):
            raise ModelError(
                f"{name}: NaN or infinite weight; repair the checkpoint before quantizing it"
            )


def _blocks_of(rows: int) -> int:
    return max(_ROWS, rows // _ROWS * _ROWS)
