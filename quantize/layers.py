"""Modules whose weights stay packed: a matrix is dequantized when it is used.

A module keeps its class's behaviour and loses some parameters. In their place is a
`PackedWeight`, which reads its matrices from streams, uint8 buffers that are the very bytes of the
checkpoint. Reading the attribute (`linear.weight`) gives the whole dequantized tensor, so any
forward works unchanged. Experts that transformers' `@use_experts_implementation` decorates run
their own forward on a stand-in that holds just the experts which a batch hit, renumbered, so that
the others are never dequantized.

Resident are the streams, and a cache of dequantized matrices with a cap in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitknap.allocation.format import Format
from bitknap.quantize.dequantize import dequantize_into
from bitknap.quantize.views import View

CACHE_BYTES = 1 << 28


class Piece(NamedTuple):
    """One unit: its bytes in a stream, and where its matrix lies in the parameter.

    Attributes:
        buffer: name of the stream in the module that holds it.
        start: first byte.
        stop: one past the last byte.
        format: how it is stored.
        rows: output features.
        cols: input features.
        view: its place in the parameter; in one expert of it where experts are stacked.
    """

    buffer: str
    start: int
    stop: int
    format: Format
    rows: int
    cols: int
    view: View


class Cache:
    """Dequantized matrices, at most `limit` bytes of them.

    What is in stays in: layers run in turn, so the matrix used longest ago is the one needed next,
    and dropping it, as caches mostly do, would find nothing from one token to the next.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit = limit
        self.used = 0
        # By the weight itself, not by its id: copies of a model must not mix up their matrices.
        self._kept: dict[tuple[PackedWeight, int], Tensor] = {}

    def get(self, weight: PackedWeight, part: int) -> Tensor | None:
        """Return one part of a weight if it is kept."""
        return self._kept.get((weight, part))

    def offer(self, weight: PackedWeight, part: int, matrix: Tensor) -> None:
        """Keep a copy of one part of a weight if there is room."""
        size = matrix.nbytes
        if self.used + size <= self.limit:
            self._kept[weight, part] = matrix.clone()
            self.used += size

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.used = 0


class PackedWeight:
    """A parameter that is dequantized when it is read.

    Attributes:
        holders: the module that holds each of its streams, by the buffer's name.
        shape: of the parameter.
        dtype: of the parameter; matrices are rounded to it once.
        stacked: whether its first dimension counts experts.
        parts: the pieces of each expert if stacked, else all of them under 0.
        layout: how streams lie.
        cache: shared by a model's weights.
        filled: whether the streams have been read; until then there is nothing but a shape.
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
        self.layout, self.cache = layout, cache
        self.filled = False
        for piece in pieces:
            part = piece.view.index if self.stacked else None
            view = replace(piece.view, index=None) if self.stacked else piece.view
            self.parts.setdefault(part or 0, []).append(piece._replace(view=view))

    def whole(self) -> Tensor:
        """Return the parameter, dequantized."""
        if self.stacked:
            return self.experts(range(self.shape[0]))
        return self._read([0], self.shape)[0]

    def experts(self, which: Sequence[int]) -> Tensor:
        """Return some experts of a stacked parameter, dequantized, [len(which), ., .]."""
        return self._read(which, self.shape[1:])

    def _read(self, which: Sequence[int], shape: Sequence[int]) -> Tensor:
        streams = {buffer: holder.get_buffer(buffer) for buffer, holder in self.holders.items()}
        device = next(iter(streams.values())).device
        # Tensors made in inference mode could not be used outside it, and these may be cached.
        with torch.inference_mode(mode=False), torch.no_grad():
            # transformers initializes what it thinks it did not load; let it, on the meta device.
            place_of = device if self.filled else torch.device("meta")
            out = torch.empty(len(which), *shape, dtype=self.dtype, device=place_of)
            if not self.filled:
                return out
            for place, part in zip(out, which, strict=True):
                known = self.cache.get(self, part)
                if known is not None:
                    place.copy_(known)
                    continue
                for piece in self.parts[part]:
                    stream = streams[piece.buffer][piece.start : piece.stop]
                    dequantize_into(piece.view.of(place), stream, piece.format, self.layout)
                self.cache.offer(self, part, place)
        return out


class _Packed(nn.Module):
    """What a module of any class gains when some of its parameters are packed."""

    packed: dict[str, PackedWeight]

    def __getattr__(self, name: str) -> Any:
        packed: Mapping[str, PackedWeight] = self.__dict__.get("packed", {})
        return packed[name].whole() if name in packed else super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for weight in self.packed.values():
            weight.dtype = fn(torch.empty(0, dtype=weight.dtype)).dtype
            weight.cache.clear()
        return self


class _PackedExperts(_Packed):
    """What decorated experts gain: only those that are hit are dequantized."""

    original: type[nn.Module]

    def forward(self, hidden_states: Tensor, index: Tensor, *args: Any, **kwargs: Any) -> Any:
        count = next(iter(self.packed.values())).shape[0]
        hit = index.unique()
        hit = hit[hit < count]  # under expert parallelism greater numbers mean: not here
        if not len(hit):
            hit = index.new_zeros(1)
        # Those stay greater than all others: `searchsorted` puts them at the end.
        places = torch.searchsorted(hit, index.contiguous())
        few = self._stand_in(hit)
        return self.original.forward(few, hidden_states, places, *args, **kwargs)

    def _stand_in(self, hit: Tensor) -> nn.Module:
        """Return the original module with the experts in `hit`, renumbered, and no others."""
        which = hit.tolist()
        own = {
            name: value[hit] if name.endswith("_bias") and value is not None else value
            for name, value in self._parameters.items()
        }
        few: nn.Module = object.__new__(self.original)
        # torch types parameters more narrowly than a forward needs them.
        given: Any = own | {name: weight.experts(which) for name, weight in self.packed.items()}
        few.__dict__.update(self.__dict__ | {"_parameters": given, "num_experts": len(which)})
        return few


@cache
def _packed_class(original: type[nn.Module], experts: bool) -> type[nn.Module]:
    base = _PackedExperts if experts else _Packed
    return type(f"Packed{original.__name__}", (base, original), {"original": original})


def pack(module: nn.Module, weights: Mapping[str, PackedWeight]) -> None:
    """Replace parameters of `module` by packed weights, in place."""
    for name in weights:
        del module._parameters[name]
    decorated = isinstance(getattr(module, "is_concatenated", None), bool)
    experts = decorated and all(weight.stacked for weight in weights.values())
    module.packed = dict(weights)  # type: ignore[assignment]
    module.__class__ = _packed_class(type(module), experts)  # type: ignore[arg-type]
    # transformers initializes modules whose parameters it did not load; these have none.
    module._is_hf_initialized = True  # type: ignore[assignment]


def packed_weights(model: nn.Module) -> Iterator[PackedWeight]:
    """Yield all packed weights of a model."""
    for module in model.modules():
        if isinstance(module, _Packed):
            yield from module.packed.values()


def unpack(module: nn.Module) -> None:
    """Undo `pack`: dequantize into ordinary parameters. Streams stay where they are."""
    if not isinstance(module, _Packed):
        return
    dequantized = {name: weight.whole() for name, weight in module.packed.items()}
    module.__class__ = type(module).original  # type: ignore[attr-defined]
    del module.packed
    for name, tensor in dequantized.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
