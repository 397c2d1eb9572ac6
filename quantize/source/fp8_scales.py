"""The scales of float8 weights: their names, and which weights share one.

X, or M.weight                            F8_E4M3 or F8_E5M2 [..., rows, cols]
X_scale_inv, X_scale, M.scale             F32, BF16, F16 or F8_E8M0; the weight is their product.
                                          U8 holds the bytes of F8_E8M0, as in MXFP8
    [..., ceil(rows / b), ceil(cols / c)]   a block of b x c shares one
    [..., rows, 1] or [..., rows]           an output row does
    [..., 1, cols]                          a column of stacked [in, out] experts does
    [], [1], [..., 1, 1] or [...]           a matrix does, or the whole tensor
X_activation_scale, M.input_scale, ...    how inputs were quantized; weights do not need them

X_scale_inv must match a stated `weight_block_size` exactly, so that a scale of a wrong shape is
noticed; transformers then still gives each embedding one X_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitknap.errors import FileError
from bitknap.quantization.source.safetensors_header import TensorInfo
from bitknap.quantization.source.source_config import block_size, group_blocks, quantization_of

CODES = ("F8_E4M3", "F8_E5M2")
# Blocks where config.json does not say: those of every published checkpoint that leaves it out.
BLOCK = (128, 128)

_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_INVERSE = ("_scale_inv", ".scale")
_SUFFIXES = (*_INVERSE, "_scale")
_ACTIVATIONS = tuple(
    f"{name}_{what}"
    for name in ("input", "output", "activation", "k", "v")
    for what in ("scale", "zero_point")
)


def scales_of(name: str, stored: Mapping[str, TensorInfo]) -> str | None:
    """Return the name of the scales of a float8 tensor, None if there are none."""
    candidates = (_beside(name, suffix) for suffix in _SUFFIXES)
    return next((scales for scales in candidates if scales in stored), None)


def values(scales: Tensor) -> Tensor:
    """Return scales as factors, float32."""
    exponents = scales.dtype == torch.uint8
    return (scales.view(torch.float8_e8m0fnu) if exponents else scales).float()


def activation_scales(name: str, stored: Mapping[str, TensorInfo]) -> list[str]:
    """Return the stored tensors that say how the inputs and outputs of a weight were quantized."""
    candidates = [f"{name}_{leaf}" for leaf in _ACTIVATIONS]
    candidates += [_beside(name, f".{leaf}") for leaf in _ACTIVATIONS]
    return [other for other in dict.fromkeys(candidates) if other in stored]


def _beside(name: str, suffix: str) -> str:
    """Return a name with a suffix: one that begins with a dot stands for the leaf "weight"."""
    if not suffix.startswith("."):
        return name + suffix
    return name.removesuffix(".weight") + suffix if name.endswith(".weight") else ""


def shared_block(
    config: Mapping[str, Any], codes: TensorInfo, scales: TensorInfo, scales_name: str
) -> tuple[int, int]:
    """Return how many rows and columns of a float8 tensor share a scale.

    Args:
        config: the parsed `config.json`.
        codes: the float8 tensor.
        scales: its scales.
        scales_name: their name.

    Raises:
        FileError: their shape or dtype fits no known granularity.
    """
    stated = block_size(config)
    blocks = [stated] if stated else group_blocks(config)
    # If the key is there but null, transformers stores one scale per tensor.
    silent = "weight_block_size" not in quantization_of(config)
    if not blocks and silent and scales_name.endswith(_INVERSE):
        blocks = [BLOCK]
    *lead, rows, cols = codes.shape
    shapes = {
        (*lead, -(-rows // block[0]), -(-cols // block[1])): block for block in reversed(blocks)
    }
    if stated is None or not scales_name.endswith(_INVERSE):
        others = {(*lead, rows, 1): (1, cols), (*lead, rows): (1, cols)}
        others |= {(*lead, 1, cols): (rows, 1)} if lead else {}
        whole = [(), (1,), tuple(lead), (*lead, 1), *(() if blocks else ((*lead, 1, 1),))]
        # If a block's shape fits, it is the one meant; the others decode alike where they clash.
        shapes = others | dict.fromkeys(whole, (max(1, rows), max(1, cols))) | shapes
    if scales.shape not in shapes or scales.dtype not in _DTYPES:
        raise FileError(
            f"{scales.file}: {scales_name}: {scales.dtype} {list(scales.shape)}, but "
            + _needed(codes, blocks)
        )
    return shapes[scales.shape]


def _needed(codes: TensorInfo, blocks: list[tuple[int, int]]) -> str:
    *lead, rows, cols = codes.shape
    if not blocks:
        return f"{list(codes.shape)} needs F32 {[*lead, rows, 1]} or [1]"
    high, wide = blocks[0]
    shape = [*lead, -(-rows // high), -(-cols // wide)]
    return f"blocks of {high} x {wide} of {list(codes.shape)} need F32 {shape}"
