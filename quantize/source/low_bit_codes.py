"""Checkpoints published in fewer than 16 bits, read as the 16-bit tensors they stand for.

FP8 (DeepSeek-V3, MiniMax-M2, Qwen3-FP8; float-quantized ones of compressed-tensors)
    X            F8_E4M3 or F8_E5M2 [..., rows, cols]
    X_scale_inv  float; the weight is their product. `fp8_scales` knows the names and the shapes

MXFP4 (gpt-oss; OCP Microscaling Formats 1.0)
    X_blocks     U8 [experts, rows, groups, 16], two E2M1 values a byte, the low half first
    X_scales     U8 [experts, rows, groups], powers of two with bias 127
    X            what the 16-bit checkpoint calls it, [experts, 32 * groups, rows]: transposed

    Without the dimension of experts, the matrix of a linear layer: [rows, 32 * groups].

Such tensors are recognised by names and shapes. `foreign_formats` refuses other quantized ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bitknap.errors import FileError, ModelError
from bitknap.quantization.models.matrix_views import View
from bitknap.quantization.source.fp8_scales import (
    BLOCK,
    CODES,
    activation_scales,
    scales_of,
    shared_block,
    values,
)
from bitknap.quantization.source.safetensors_header import TensorInfo

_BLOCKS, _SCALES = "_blocks", "_scales"
# Values that share a scale, and bytes that hold them.
_GROUP, _GROUP_BYTES = 32, 16
_BIAS = 127
# Bytes of codes decoded at a time: temporaries stay in the cache.
_PIECE = 1 << 18
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LowBit:
    """How one 16-bit tensor is stored: codes, and scales beside them.

    Attributes:
        kind: its name in `Format.keep`.
        parts: the stored tensors by name: codes, scales, and those that decoding does not need.
        block: output rows and input columns that share a scale.
        transposed: whether the 16-bit tensor has rows and columns the other way round.
    """

    kind: Literal["fp8-block", "mxfp4"]
    parts: Mapping[str, TensorInfo]
    block: tuple[int, int]
    transposed: bool = False

    @property
    def codes(self) -> TensorInfo:
        """The place of the codes."""
        return next(iter(self.parts.values()))

    @property
    def needed(self) -> list[tuple[str, TensorInfo]]:
        """Name and place of the codes, then of the scales."""
        return list(self.parts.items())[:2]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(info.stop - info.start for info in self.parts.values())

    @property
    def keepable(self) -> bool:
        """Whether `cut` and `restore` know its blocks."""
        return self.kind == "mxfp4" or (self.block == BLOCK and self.codes.dtype == CODES[0])


class Stored(NamedTuple):
    """Codes and scales as read: [..., rows, cols] values or [..., rows, groups, 16] bytes."""

    codes: Tensor
    scales: Tensor


def logical(
    config: Mapping[str, Any], stored: Mapping[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], dict[str, LowBit]]:
    """Return the tensors that a 16-bit checkpoint would have, and how low-bit ones are stored.

    Args:
        config: the parsed `config.json`; the blocks that it names are used.
        stored: tensor name to dtype, shape and place, as the headers say.

    Returns:
        Tensor name to dtype, shape and place, low precision as "BF16" in the place of its codes;
        and the low-bit tensors by their 16-bit names.

    Raises:
        FileError: codes and scales do not fit each other, or one of them is missing.
    """
    headers: dict[str, TensorInfo] = {}
    low_bit: dict[str, LowBit] = {}
    for name, info in stored.items():
        if _is_mxfp4(name, info):
            plain = name.removesuffix(_BLOCKS)
            low_bit[plain] = _mxfp4(name, info, stored)
            *experts, rows, groups, _ = info.shape
            cols = groups * _GROUP
            shape = (*experts, cols, rows) if experts else (rows, cols)
            headers[plain] = info._replace(dtype="BF16", shape=shape)
        elif info.dtype in CODES and len(info.shape) > 1 and (scales := scales_of(name, stored)):
            parts = {name: info, scales: stored[scales]}
            parts |= {other: stored[other] for other in activation_scales(name, stored)}
            block = shared_block(config, info, stored[scales], scales)
            low_bit[name] = LowBit(kind="fp8-block", parts=parts, block=block)
            headers[name] = info._replace(dtype="BF16")
        else:
            headers[name] = info
    for low in low_bit.values():
        for part in low.parts:
            if part not in low_bit:
                headers.pop(part, None)
    return headers, low_bit


def _is_mxfp4(name: str, info: TensorInfo) -> bool:
    last = info.shape[-1:] == (_GROUP_BYTES,)
    return name.endswith(_BLOCKS) and info.dtype == "U8" and len(info.shape) in (3, 4) and last


def _mxfp4(name: str, info: TensorInfo, stored: Mapping[str, TensorInfo]) -> LowBit:
    other = name.removesuffix(_BLOCKS) + _SCALES
    scales = stored.get(other)
    if scales is None:
        raise FileError(f"{info.file}: {name}: no {other} in the checkpoint; is a shard missing?")
    if (scales.dtype, scales.shape) != ("U8", info.shape[:-1]):
        raise FileError(
            f"{scales.file}: {other}: {scales.dtype} {list(scales.shape)}, but {name} needs "
            f"U8 {list(info.shape[:-1])}"
        )
    parts, stacked = {name: info, other: scales}, len(info.shape) == 4
    return LowBit(kind="mxfp4", parts=parts, block=(1, _GROUP), transposed=stacked)


def decode(low: LowBit, stored: Stored, first: int = 0) -> Tensor:
    """Return the 16-bit tensor, bfloat16; stacked MXFP4 comes as a transposed view.

    Products are taken in float32 and rounded once; those of MXFP4 are exact.

    Args:
        low: how it is stored.
        stored: codes and scales, whole or the same experts of both.
        first: first row of the given codes of one FP8 matrix, whose scales are whole.
    """
    if low.kind == "mxfp4":
        decoded = _decode_mxfp4(stored)
        return decoded.transpose(-1, -2) if low.transposed else decoded
    weights = torch.empty(stored.codes.shape, dtype=torch.bfloat16)
    if not weights.numel():
        return weights
    rows, cols = weights.shape[-2:]
    high, wide = low.block
    flat, codes = weights.view(-1, rows, cols), stored.codes.reshape(-1, rows, cols)
    grids = values(stored.scales).reshape(-1)
    count = len(flat) if grids.numel() > 1 else 1
    grids = grids.view(count, -1, -(-cols // wide)).expand(len(flat), -1, -1)
    step = max(1, _PIECE // cols)  # a band of rows at a time: little beside the result
    for one, matrix, grid in zip(flat, codes, grids, strict=True):
        for start in range(0, rows, step):
            band = slice(start, min(rows, start + step))
            shared = grid[torch.arange(first + band.start, first + band.stop) // high]
            spread = shared.repeat_interleave(wide, 1)[:, :cols] if wide > 1 else shared
            one[band] = matrix[band].float() * spread
    return weights


def _decode_mxfp4(stored: Stored) -> Tensor:
    """Return [..., rows, 32 * groups] bfloat16."""
    values, byte = torch.tensor(_E2M1, dtype=torch.bfloat16), torch.arange(256)
    # Both values of a byte in one word, so that one look-up gives them.
    words = torch.stack([values[byte & 15], values[byte >> 4]], dim=-1).view(torch.int32).flatten()
    powers = torch.tensor([2.0 ** (exponent - _BIAS) for exponent in range(256)])
    *lead, groups, width = stored.codes.shape
    codes = stored.codes.reshape(-1, groups, width)
    scales = powers.bfloat16()[stored.scales.reshape(-1, groups).int()].unsqueeze(-1)
    weights = torch.empty(len(codes), groups, 2 * width, dtype=torch.bfloat16)
    rows = max(1, _PIECE // (groups * width))
    for start in range(0, len(codes), rows):
        part = slice(start, start + rows)
        looked_up = words.index_select(0, codes[part].int().flatten())
        pairs = looked_up.view(torch.bfloat16).view(-1, groups, 2 * width)
        torch.mul(pairs, scales[part], out=weights[part])
    return weights.view(*lead, groups * 2 * width)


def cut(low: LowBit, stored: Stored, view: View) -> Tensor:
    """Return the bytes of one matrix kept as it is stored: its codes, then its scales, uint8.

    FP8 scales come as float32, whatever the checkpoint holds them in. The length is
    `Format.keep(low.kind).nbytes(rows, cols)`.

    Args:
        low: how the tensor is stored.
        stored: codes and scales, whole.
        view: where the matrix lies in the 16-bit tensor.

    Raises:
        ModelError: the matrix ends inside a block, so that it shares scales with another.
    """
    if low.kind == "mxfp4":
        straight = replace(view, transposed=view.transposed != low.transposed)
        if straight.transposed:
            raise ModelError(
                f"{view.tensor}: its scales run along output rows, so its precision cannot be "
                "kept; quantize it"
            )
        codes = straight.of(stored.codes.flatten(-2))
        return torch.cat([codes.reshape(-1), straight.of(stored.scales).reshape(-1)])
    step = low.block[1] if view.transposed else low.block[0]
    rows = replace(view, start=None, stop=None).of(stored.codes).shape[0]
    start, stop = view.start or 0, rows if view.stop is None else view.stop
    between = start % step or (stop % step and stop != rows)
    if between or view.step is not None or view.parts is not None or not low.keepable:
        raise ModelError(
            f"{view.tensor}: the scales of this matrix cannot be separated from others, so its "
            "precision cannot be kept; quantize it"
        )
    blocks = replace(view, start=start // step, stop=-(-stop // step))
    codes = view.of(stored.codes).contiguous().view(torch.uint8).reshape(-1)
    scales = values(blocks.of(stored.scales)).contiguous().view(torch.uint8).reshape(-1)
    return torch.cat([codes, scales])


def restore(stream: Tensor, kind: str, rows: int, cols: int) -> Tensor:
    """Return the matrix whose bytes `cut` returned, float32 [rows, cols], rounded to bfloat16.

    Args:
        stream: uint8.
        kind: "fp8-block" or "mxfp4".
        rows: output features.
        cols: input features.
    """
    if kind == "mxfp4":
        groups = cols // _GROUP
        codes, scales = stream.split([rows * groups * _GROUP_BYTES, rows * groups])
        shaped = Stored(codes.view(rows, groups, _GROUP_BYTES), scales.view(rows, groups))
        return _decode_mxfp4(shaped).float()
    grid = tuple(-(-n // step) for n, step in zip((rows, cols), BLOCK, strict=True))
    values, tail = stream.split([rows * cols, 4 * math.prod(grid)])
    low = LowBit(kind="fp8-block", parts={}, block=BLOCK)
    scales = tail.clone().view(torch.float32).view(grid)
    return decode(low, Stored(values.view(torch.float8_e4m3fn).view(rows, cols), scales)).float()
