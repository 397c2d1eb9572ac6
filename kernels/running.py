"""Launches a layer's kernels. Imports Triton; loaded at the first call that needs it.

Nothing here reads a tensor: sizes, grids and allocations follow from shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitknap.kernels.decode import decode_down, decode_gate_up
from bitknap.kernels.experts import Opened, Stack
from bitknap.kernels.launch import Launch, Tile

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_WIDEST = 128  # columns of one product: the most that all of a 256-column block's groups divide


def run(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    experts: Opened,
    launch: Launch,
    compute: torch.dtype | None = None,
    asm: bool = True,
) -> Tensor:
    """Return what `kernels.moe.moe` does, by Triton.

    Args:
        x: activations [T, H], contiguous.
        index: experts of each token [T, k], contiguous.
        weights: of them, contiguous.
        experts: of the layer.
        launch: how.
        compute: type that products are taken in, that of `x` if None; Triton's interpreter needs
            float32 or fp16.
        asm: whether codes are read by inline PTX.
    """
    tokens, topk = index.shape
    out = torch.empty_like(x)
    if not index.numel():
        return out.zero_()
    layer = _Layer(x, index, weights, experts, launch, compute or x.dtype, asm)
    return {"decode": _decode}[launch.path](layer, out)


class _Layer:
    """What all launches of one call share."""

    def __init__(
        self,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        experts: Opened,
        launch: Launch,
        compute: torch.dtype,
        asm: bool,
    ) -> None:
        self.x, self.index, self.weights = x, index, weights
        self.experts, self.launch = experts, launch
        self.tokens, self.topk = index.shape
        self.pairs = index.numel()
        self.count = experts.up.columns["bits"].shape[0]
        self.inner, self.hidden = experts.up.rows, experts.up.cols
        self.shapes: dict[str, Any] = {
            "HIDDEN": self.hidden,
            "INNER": self.inner,
            "EXPERTS": self.count,
            "TOPK": self.topk,
        }
        self.how: dict[str, Any] = {"WIDEST": _WIDEST, "CT": _TYPES[compute], "ASM": asm}
        gate = experts.gate
        self.gate_up: dict[str, Any] = {
            "KINDS": _codes(experts.up),
            "GATE_KINDS": _codes(gate or experts.up),
            "GATED": gate is not None,
            "TIED": experts.tied,
            "BIASED": experts.up_bias is not None or experts.gate_bias is not None,
            "ACTIVATION": experts.activation,
        }
        self.down: dict[str, Any] = {
            "KINDS": _codes(experts.down),
            "BIASED": experts.down_bias is not None,
        }

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)


def _codes(stack: Stack) -> tuple[int, ...]:
    return tuple(kind.code for kind in stack.kinds)


def _table(stack: Stack, bias: Tensor | None) -> tuple[Tensor, ...]:
    c = stack.columns
    # A launch without biases does not look at the last one.
    last = c["buffer"] if bias is None else bias
    return (c["buffer"], c["codes_at"], c["words_at"], c["rows_at"], c["kind"], last)


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def _decode(layer: _Layer, out: Tensor) -> Tensor:
    experts, launch = layer.experts, layer.launch
    slots = min(layer.pairs, layer.count)
    by_expert = layer.count <= layer.pairs
    common = {
        **layer.shapes,
        **layer.how,
        "KP": triton.next_power_of_2(layer.topk),
        "BY_EXPERT": by_expert,
        "BM": launch.tokens,
    }
    gate_up, down = launch.gate_up, launch.down
    hidden = layer.empty(layer.pairs, layer.inner, dtype=layer.x.dtype)
    column_tiles = triton.cdiv(layer.hidden, down.rows)
    counters = triton.next_power_of_2(column_tiles)
    arrived = layer.empty(counters, dtype=torch.int32)
    up = _table(experts.up, experts.up_bias)
    decode_gate_up[(slots * triton.cdiv(layer.inner, gate_up.rows),)](
        layer.x,
        layer.index,
        hidden,
        arrived,
        _table(experts.gate, experts.gate_bias) if experts.gate else up,
        up,
        experts.up.columns["order"],
        layer.tokens,
        **common,
        **layer.gate_up,
        COUNTERS=counters,
        HALF=gate_up.rows,
        **_options(gate_up),
    )
    part = layer.empty(down.split, layer.pairs, layer.hidden, dtype=torch.float32)
    decode_down[(slots * down.split * column_tiles,)](
        hidden,
        layer.index,
        layer.weights,
        part,
        arrived,
        out,
        _table(experts.down, experts.down_bias),
        experts.down.columns["order"],
        layer.tokens,
        slots,
        **common,
        **layer.down,
        SPLIT=down.split,
        BN=down.rows,
        **_options(down),
    )
    return out
