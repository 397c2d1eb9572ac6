"""A power-of-two factor of a whole matrix, stored in the spare sign bits of its scales.

Scales are fp16 above 0, so their sign bits are spare. The signs of the first scale in the first
five rows are the bits of a number e, lowest first, in two's complement: the dequantized matrix is
multiplied by 2^(8 e). Ordinary matrices have e = 0, with no sign set; e takes no extra bytes. No
Triton here: `quantize` shares this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitknap.errors import InputError

ROWS, STEP = 5, 8  # rows whose signs are read; exponents are multiples of STEP
MOST = STEP * (2 ** (ROWS - 1) - 1)  # the least is -MOST, so that its reciprocal is a float32
_SIGN = -(1 << 15)
_LARGEST = torch.finfo(torch.bfloat16).max  # fits every dtype of weights but fp16


def power(exponent: Tensor) -> Tensor:
    """Return 2^exponent exactly, float32.

    Args:
        exponent: from -126 to 127, int32.
    """
    return ((exponent + 127) << 23).view(torch.float32)


def times_power(weights: Tensor, exponent: Tensor | int) -> Tensor:
    """Return finite float32 weights times 2^exponent, in place; at most the largest bfloat16.

    Args:
        weights: [rows, cols].
        exponent: exponent of all rows, or int32 [rows, 1] of each row.
    """
    if isinstance(exponent, int):
        return weights.mul_(2.0**exponent).clamp_(-_LARGEST, _LARGEST) if exponent else weights
    return weights.mul_(power(exponent)).clamp_(-_LARGEST, _LARGEST)


def with_exponent(scale: Tensor, exponent: int) -> Tensor:
    """Return scales with a matrix's exponent stored in their signs.

    Args:
        scale: scales of all rows, fp16 [rows, n], above 0.
        exponent: a multiple of STEP from -MOST to MOST.

    Raises:
        InputError: the exponent is not 0, and there are too few rows to hold it.
    """
    if not exponent:
        return scale
    if len(scale) < ROWS:
        raise InputError(
            f"weights need a factor of 2^{exponent}, which a matrix of {len(scale)} rows cannot "
            f"store (it needs {ROWS}); keep the precision that it is stored in"
        )
    bits = [exponent // STEP >> at & 1 for at in range(ROWS)]
    marked = scale.clone(memory_format=torch.contiguous_format)
    signs = torch.tensor(bits, dtype=torch.int16, device=scale.device) * _SIGN
    marked.view(torch.int16)[:ROWS, 0] |= signs
    return marked


def split_exponent(scale: Tensor) -> tuple[Tensor, int]:
    """Undo `with_exponent`: return scales without signs, and the exponent."""
    # Meta tensors have no values to read.
    signs = [] if scale.is_meta or not scale.numel() else scale[:ROWS, 0].signbit().tolist()
    if not any(signs):
        return scale, 0
    value = sum(1 << at for at, is_set in enumerate(signs) if is_set)
    return scale.abs(), STEP * (value - (1 << ROWS) * (value >> (ROWS - 1)))
