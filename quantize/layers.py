"""Modules whose weights stay packed: a matrix is dequantized when it is used.

A module keeps its class's behaviour and loses some parameters. In their place is a
`PackedWeight`, which reads its matrices from streams, uint8 buffers that are the very bytes of the
checkpoint. Reading the attribute (`linear.weight`) gives the whole dequantized tensor, so any
forward works unchanged. Experts that transformers' `@use_experts_implementation` decorates run
their own forward on `Matrices`, so that those which a batch does not hit are never dequantized.

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
from bitknap.quantize.cache import Cache
from bitknap.quantize.dequantize import dequantize_into
from bitknap.quantize.matrices import Matrices
from bitknap.quantize.views import View


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
        """Return the parameter, dequantized; nobody may write to it."""
        if self.stacked and self.filled:
            return torch.stack([self.matrix(expert) for expert in range(self.shape[0])])
        return self.matrix(0) if self.filled else self._empty(self.shape)

    def matrix(self, part: int) -> Tensor:
        """Return an expert of a stacked parameter, or all of another; nobody may write to it."""
        key = (self, part)
        found = self.cache.get(key)
        if found is None:
            # Tensors made in inference mode could not be used outside it, and these may be kept.
            with torch.inference_mode(mode=False), torch.no_grad():
                found = self._empty(self.shape[1:] if self.stacked else self.shape)
                for piece in self.parts[part]:
                    stream = self.holders[piece.buffer].get_buffer(piece.buffer)
                    view = piece.view.of(found)
                    some = stream[piece.start : piece.stop]
                    dequantize_into(view, some, piece.format, self.layout)
            self.cache.offer(key, found)
        return found

    def matrices(self) -> Matrices:
        """Return the experts of a stacked parameter, dequantized one by one when used."""
        return Matrices(self.matrix, self.shape, self.dtype, self._device)

    @property
    def _device(self) -> torch.device:
        buffer, holder = next(iter(self.holders.items()))
        return holder.get_buffer(buffer).device

    def _empty(self, shape: Sequence[int]) -> Tensor:
        # transformers initializes what it thinks it did not load; let it, on the meta device.
        device = self._device if self.filled else torch.device("meta")
        return torch.empty(tuple(shape), dtype=self.dtype, device=device)


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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # The class's own forward, on a module that has no stacks but dequantizes what is hit.
        own: nn.Module = object.__new__(self.original)
        matrices = {name: weight.matrices() for name, weight in self.packed.items()}
        # torch types parameters more narrowly than a forward needs them.
        given: Any = self._parameters | matrices
        own.__dict__.update(self.__dict__ | {"_parameters": given})
        return self.original.forward(own, *args, **kwargs)


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
    dequantized = {name: weight.whole().clone() for name, weight in module.packed.items()}
    module.__class__ = type(module).original  # type: ignore[attr-defined]
    del module.packed
    for name, tensor in dequantized.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
