"""A parameter whose bytes stay packed: it is dequantized when it is read, one expert at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitknap.allocation.problem.format import Format
from bitknap.quantization.models.matrix_views import View
from bitknap.quantization.packed.dequantize import dequantize_into
from bitknap.quantization.packed.tiled_bytes import to_plain, to_tiles
from bitknap.quantization.runtime.dequantized_cache import Cache
from bitknap.quantization.runtime.lazy_stack import Matrices


class Piece(NamedTuple):
    """One unit: its bytes in a stream, and where its matrix lies in the parameter.

    Attributes:
        buffer: name of the stream in the module that holds it.
        start: first byte.
        stop: one past the last byte.
        format: how it is stored.
        rows: output features.
        cols: input features.
        view: its place in the parameter, or in one expert's matrix if experts are stacked.
    """

    buffer: str
    start: int
    stop: int
    format: Format
    rows: int
    cols: int
    view: View


class PackedWeight:
    """A parameter that is dequantized when it is read.

    Attributes:
        holders: the module that holds each of its streams, by the buffer's name.
        shape: shape of the parameter.
        dtype: dtype of the parameter; matrices are rounded to it once.
        stacked: whether its first dimension counts experts.
        parts: the pieces of each expert if stacked, else all of them under 0.
        layout: byte layout of the streams now.
        stored: their byte layout in the checkpoint.
        cache: shared by a model's weights.
        filled: whether the streams have been read; until then only the shape is known.
    """

    def __init__(
        self,
        holders: Mapping[str, nn.Module],
        like: Tensor,
        dtype: torch.dtype,
        pieces: Sequence[Piece],
        layout: str,
        cache: Cache,
    ) -> None:
        self.holders, self.shape, self.dtype = holders, tuple(like.shape), dtype
        self.stacked = like.dim() == 3 and all(p.view.index is not None for p in pieces)
        self.parts: dict[int, list[Piece]] = {}
        self.layout = self.stored = layout
        self.cache = cache
        self.filled = False
        for piece in pieces:
            part = piece.view.index if self.stacked else None
            view = replace(piece.view, index=None) if self.stacked else piece.view
            self.parts.setdefault(part or 0, []).append(piece._replace(view=view))

    def whole(self) -> Tensor:
        """Return the parameter, dequantized; callers must not write to it."""
        if self.stacked and self.filled:
            return torch.stack([self.matrix(expert) for expert in range(self.shape[0])])
        return self.matrix(0) if self.filled else self._empty(self.shape)

    def matrix(self, part: int) -> Tensor:
        """Return one expert of a stacked parameter, or all of any other; do not write to it."""
        key = (self, part)
        dequantized = self.cache.get(key)
        if dequantized is None:
            # Tensors made in inference mode could not be used outside it, and these may be kept.
            with torch.inference_mode(mode=False), torch.no_grad():
                dequantized = self._empty(self.shape[1:] if self.stacked else self.shape)
                for piece in self.parts[part]:
                    stream = self.holders[piece.buffer].get_buffer(piece.buffer)
                    view = piece.view.of(dequantized)
                    some = stream[piece.start : piece.stop]
                    dequantize_into(view, some, piece.format, self.layout)
            self.cache.offer(key, dequantized)
        return dequantized

    def matrices(self) -> Matrices:
        """Return the experts of a stacked parameter, dequantized one by one when used."""
        return Matrices(self.matrix, self.shape, self.dtype, self.device)

    def lay(self, layout: str) -> None:
        """Convert only this parameter's streams to another layout, in place and bit for bit."""
        if layout == self.layout:
            return
        at: dict[str, int] = {}
        moved: dict[str, dict[int, tuple[int, int]]] = {}
        for buffer, holder in self.holders.items():
            units, at[buffer], moved[buffer] = [], 0, {}
            for piece in self._in_order(buffer):
                units.append(self._unit(piece, layout))
                moved[buffer][piece.start] = (at[buffer], at[buffer] + len(units[-1]))
                at[buffer] += len(units[-1])
            holder._buffers[buffer] = torch.cat(units)
        for pieces in self.parts.values():
            for i, piece in enumerate(pieces):
                start, stop = moved[piece.buffer][piece.start]
                pieces[i] = piece._replace(start=start, stop=stop)
        self.layout = layout

    def as_stored(self, buffer: str) -> Tensor:
        """Return a stream in the checkpoint's layout."""
        if self.layout == self.stored:
            return self.holders[buffer].get_buffer(buffer)
        return torch.cat([self._unit(p, self.stored) for p in self._in_order(buffer)])

    def _in_order(self, buffer: str) -> list[Piece]:
        pieces = [p for some in self.parts.values() for p in some if p.buffer == buffer]
        return sorted(pieces, key=lambda piece: piece.start)

    def _unit(self, piece: Piece, layout: str) -> Tensor:
        """Convert the bytes of one unit to the layout that its stream does not have."""
        stream = self.holders[piece.buffer].get_buffer(piece.buffer)[piece.start : piece.stop]
        turn = to_tiles if layout == "tiles" else to_plain
        with stream.device:
            return turn(stream, piece.format, piece.rows, piece.cols)

    @property
    def device(self) -> torch.device:
        """The device of its streams."""
        buffer, holder = next(iter(self.holders.items()))
        return holder.get_buffer(buffer).device

    def _empty(self, shape: Sequence[int]) -> Tensor:
        # transformers initializes what it did not load itself; let it do so on the meta device.
        device = self.device if self.filled else torch.device("meta")
        return torch.empty(tuple(shape), dtype=self.dtype, device=device)
