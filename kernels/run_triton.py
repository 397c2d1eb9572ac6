"""Launch a layer's kernels. Imports Triton; loaded at the first call that needs it.

Nothing here reads a tensor: sizes, grids and allocations follow from shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitknap.kernels.dense import dense_moe
from bitknap.kernels.device.constants import sums_of, tiles_of
from bitknap.kernels.device.decode import decode_down, decode_gate_up
from bitknap.kernels.device.grouped import (
    combine,
    dequantize,
    grouped_down,
    grouped_gate_up,
    sort_pairs,
)
from bitknap.kernels.device.input_sums import STEP, row_sums
from bitknap.kernels.experts import Opened, Stack
from bitknap.kernels.launch import Launch, Tile

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
Start = Callable[[Any, tuple[int, ...], tuple[Any, ...], Mapping[str, Any], Tile], None]
"""Starts a kernel, given the kernel, its grid, arguments, constants, and warps and stages."""

# Up to this many tokens, programs of the decode path sum their inputs themselves: reading the
# inputs twice takes less time than another launch.
_OWN_SUMS = 4
_DEQUANTIZING = Tile(rows=64, stages=2)


def _start(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    tile: Tile,
) -> None:
    kernel[grid](*arguments, **constants, num_warps=tile.warps, num_stages=tile.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How kernels are compiled and started.

    Attributes:
        compute: type of the operands of products, that of the activations if None; Triton's
            interpreter needs float32 or fp16.
        asm: whether codes are read by inline PTX.
        start: function that starts kernels; replaceable, to record launches only.
    """

    compute: torch.dtype | None = None
    asm: bool = True
    start: Start = _start


def run(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    experts: Opened,
    launch: Launch,
    execution: Execution | None = None,
) -> Tensor:
    """Return the result of `kernels.moe.moe`, computed by Triton.

    Args:
        x: activations [T, H], contiguous.
        index: experts of each token [T, k], contiguous.
        weights: routing weights of these experts, contiguous.
        experts: experts of the layer.
        launch: the launch.
        execution: how to compile and start kernels; for the local GPU if None.
    """
    out = torch.empty_like(x)
    if not index.numel():
        return out.zero_()
    layer = _Layer(x, index, weights, experts, launch, execution or Execution())
    return {"decode": _decode, "grouped": _grouped, "dense": _dense}[launch.path](layer, out)


class _Layer:
    """State shared by all launches of one call."""

    def __init__(
        self,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        experts: Opened,
        launch: Launch,
        execution: Execution,
    ) -> None:
        self.start = execution.start
        self.x, self.index, self.weights = x, index, weights
        self.experts, self.launch = experts, launch
        self.tokens, self.topk = index.shape
        self.pairs = index.numel()
        self.count = len(experts.up)
        self.inner, self.hidden = experts.up.rows, experts.up.cols
        self.shapes: dict[str, Any] = {
            "HIDDEN": self.hidden,
            "INNER": self.inner,
            "EXPERTS": self.count,
        }
        self.how: dict[str, Any] = {
            "CT": _TYPES[execution.compute or x.dtype],
            "ASM": execution.asm,
        }
        gate = experts.gate
        self.gate_up: dict[str, Any] = {
            "KINDS": _codes(experts.up),
            "GATE_KINDS": _codes(gate or experts.up),
            "GATED": gate is not None,
            "CUT": experts.up.blocks,
            "TIED": experts.tied,
            "BIASED": experts.up_bias is not None or experts.gate_bias is not None,
            "ACTIVATION": experts.activation,
        }
        self.down: dict[str, Any] = {
            "KINDS": _codes(experts.down),
            "CUT": experts.down.blocks,
            "BIASED": experts.down_bias is not None,
        }

    def tables(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the tables of gate and up; up's twice if there is no gate."""
        up = _table(self.experts.up, self.experts.up_bias)
        gate = self.experts.gate
        return (_table(gate, self.experts.gate_bias) if gate else up, up)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)


def _codes(stack: Stack) -> tuple[int, ...]:
    return tuple(kind.code for kind in stack.kinds)


def _cut(tile: Tile, rows: str) -> dict[str, int]:
    """Return the tiling constants of a projection; `rows` is the kernel's name for tile rows."""
    return {rows: tile.rows, "WIDEST": tile.columns}


def _table(stack: Stack, bias: Tensor | None) -> tuple[Tensor, ...]:
    c = stack.columns
    # A launch without biases ignores the last tensor.
    last = c["buffer"] if bias is None else bias
    return (c["buffer"], c["codes_at"], c["words_at"], c["rows_at"], c["kind"], last)


def _decode(layer: _Layer, out: Tensor) -> Tensor:
    experts, launch = layer.experts, layer.launch
    slots = min(layer.pairs, layer.count)
    own = layer.tokens <= _OWN_SUMS
    common = {
        **layer.shapes,
        **layer.how,
        "TOPK": layer.topk,
        "KP": triton.next_power_of_2(layer.topk),
        "BY_EXPERT": layer.count <= layer.pairs,
        "BM": launch.tokens,
        "OWN_SUMS": own,
    }
    gate_up, down = launch.gate_up, launch.down
    hidden = layer.empty(layer.pairs, layer.inner, dtype=layer.x.dtype)
    column_tiles = tiles_of(layer.hidden, experts.down.blocks, down.rows)
    counters = triton.next_power_of_2(column_tiles)
    arrived = layer.empty(counters, dtype=torch.int32)
    sums = _sums(layer, layer.x, launched=not own)
    layer.start(
        decode_gate_up,
        (slots * tiles_of(layer.inner, experts.up.blocks, gate_up.rows),),
        (
            layer.x,
            layer.index,
            hidden,
            arrived,
            sums,
            *layer.tables(),
            experts.up.columns["order"],
            layer.tokens,
        ),
        {**common, **layer.gate_up, "COUNTERS": counters, **_cut(gate_up, "HALF")},
        gate_up,
    )
    sums = _sums(layer, hidden, launched=not own)
    part = layer.empty(down.split, layer.pairs, layer.hidden, dtype=torch.float32)
    layer.start(
        decode_down,
        (slots * down.split * column_tiles,),
        (
            hidden,
            layer.index,
            layer.weights,
            part,
            arrived,
            out,
            sums,
            _table(experts.down, experts.down_bias),
            experts.down.columns["order"],
            layer.tokens,
            slots,
        ),
        {**common, **layer.down, "SPLIT": down.split, **_cut(down, "BN")},
        down,
    )
    return out


def _grouped(layer: _Layer, out: Tensor) -> Tensor:
    experts, launch = layer.experts, layer.launch
    counts, starts, pairs = _sorted(layer)
    common = {
        **layer.shapes,
        **layer.how,
        "EP": triton.next_power_of_2(layer.count),
        "BM": launch.tokens,
        "POST": launch.post,
    }
    gate_up, down = launch.gate_up, launch.down
    tiles = most_tiles(layer.pairs, layer.count, launch.tokens)
    hidden = layer.empty(layer.pairs, layer.inner, dtype=layer.x.dtype)

    def sums(x: Tensor) -> Tensor:
        return _sums(layer, x) if launch.post else x  # not read where weights are scaled

    layer.start(
        grouped_gate_up,
        (tiles * tiles_of(layer.inner, experts.up.blocks, gate_up.rows),),
        (
            layer.x,
            counts,
            starts,
            pairs,
            hidden,
            sums(layer.x),
            *layer.tables(),
            experts.up.columns["order"],
        ),
        {**common, **layer.gate_up, "TOPK": layer.topk, **_cut(gate_up, "HALF")},
        gate_up,
    )
    part = layer.empty(layer.pairs, layer.hidden, dtype=layer.x.dtype)
    layer.start(
        grouped_down,
        (tiles * tiles_of(layer.hidden, experts.down.blocks, down.rows),),
        (
            hidden,
            layer.weights,
            counts,
            starts,
            pairs,
            part,
            sums(hidden),
            _table(experts.down, experts.down_bias),
            experts.down.columns["order"],
        ),
        {**common, **layer.down, **_cut(down, "BN")},
        down,
    )
    return _combined(layer, part, out)


def _dense(layer: _Layer, out: Tensor) -> Tensor:
    def weights(stack: Stack) -> Tensor:
        w = layer.empty(len(stack), stack.rows, stack.cols, dtype=layer.x.dtype)
        layer.start(
            dequantize,
            (len(stack) * stack.blocks, triton.cdiv(stack.long, _DEQUANTIZING.rows)),
            (w, _table(stack, None)),
            {
                **layer.how,
                "ROWS": stack.long,
                "COLS": stack.cols,
                "KINDS": _codes(stack),
                **_cut(_DEQUANTIZING, "BN"),
            },
            _DEQUANTIZING,
        )
        return w

    counts, starts, pairs = _sorted(layer, fill=layer.pairs)
    part = dense_moe(layer.x, layer.weights, pairs, starts + counts, layer.experts, weights)
    return _combined(layer, part, out)


def _sums(layer: _Layer, x: Tensor, *, launched: bool = True) -> Tensor:
    """Return the sums over runs of each row's columns; without a launch, an empty buffer."""
    rows, cols = x.shape
    sums = layer.empty(rows, sums_of(cols), dtype=torch.float32)
    if launched:
        grid = (rows, triton.cdiv(cols, STEP.value))
        layer.start(row_sums, grid, (x, sums), {"COLS": cols}, Tile())
    return sums


def _sorted(layer: _Layer, fill: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return experts' counts [E], starts [E], and pairs by expert [T · k].

    Entries past the last pair with an expert on this device are `fill`, or arbitrary if None.
    """
    counts = layer.empty(layer.count, dtype=torch.int32)
    starts = layer.empty(layer.count, dtype=torch.int32)
    pairs = layer.empty(layer.pairs, dtype=torch.int32)
    if fill is not None:
        pairs.fill_(fill)
    block = max(128, min(2048, triton.next_power_of_2(layer.pairs)))
    layer.start(
        sort_pairs,
        (layer.count,),
        (layer.index, counts, starts, pairs, layer.pairs),
        {"EXPERTS": layer.count, "BLOCK": block},
        Tile(),
    )
    return counts, starts, pairs


def _combined(layer: _Layer, part: Tensor, out: Tensor) -> Tensor:
    block = min(1024, triton.next_power_of_2(layer.hidden))
    layer.start(
        combine,
        (layer.tokens, triton.cdiv(layer.hidden, block)),
        (part, layer.index, out),
        {
            "HIDDEN": layer.hidden,
            "EXPERTS": layer.count,
            "TOPK": layer.topk,
            "BLOCK": block,
        },
        Tile(),
    )
    return out


def most_tiles(pairs: int, experts: int, tokens: int) -> int:
    """Return the most tiles of `tokens` pairs under any assignment of pairs to experts."""
    return min(pairs, (pairs + min(experts, pairs) * (tokens - 1)) // tokens)
