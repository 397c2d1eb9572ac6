"""The power of two that a whole matrix is multiplied by, in bits that its scales leave free.

Scales are fp16 above 0, so their signs are spare. Those of the first scale of the first five rows
are the bits of a number e, lowest first, in two's complement: the matrix is what its codes, scales
and zeros stand for, times 2^(8 e). Ordinary matrices have e = 0, and no sign is set; e takes no
byte of its own. No Triton here: `quantize` shares this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitknap.errors import InputError

ROWS, STEP = 5, 8  # rows whose signs are read, and what exponents are multiples of
MOST = STEP * (2 ** (ROWS - 1) - 1)  # and the least is -MOST, so that its reciprocal is a float32
_SIGN = -(1 << 15)
_LARGEST = torch.finfo(torch.bfloat16).max  # every dtype of weights but fp16 holds it


def power(exponent: Tensor) -> Tensor:
    """Return 2^exponent, float32, to the bit.

    Args:
        exponent: from -126 to 127, int32.
    """
    return ((exponent + 127) << 23).view(torch.float32)


def times_power(weights: Tensor, exponent: Tensor | int) -> Tensor:
    """Return finite float32 weights times 2^exponent, in place; at most the largest bfloat16.

    Args:
        weights: [rows, cols].
        exponent: exponent of all, or int32 [rows, 1] of each row.
    """
    if isinstance(exponent, int):
        return weights.mul_(2.0**exponent).clamp_(-_LARGEST, _LARGEST) if exponent else weights
    return weights.mul_(power(exponent)).clamp_(-_LARGEST, _LARGEST)


def with_exponent(scale: Tensor, exponent: int) -> Tensor:
    """Return scales with a matrix's exponent in their signs.

    Args:
        scale: scales of all rows, fp16 [rows, n], above 0.
        exponent: a multiple of STEP from -MOST to MOST.

    Raises:
        InputError: an exponent, and too few rows to hold it.
    """
    if not exponent:
        return scale
    if len(scale) < ROWS:
        raise InputError(
            f"weights need a factor of 2^{exponent}, which a matrix of {len(scale)} rows cannot "
            f"store (it needs {ROWS}); keep its precision"
        )
    bits = [exponent // STEP >> at & 1 for at in range(ROWS)]
    marked = scale.clone(memory_format=torch.contiguous_format)
    signs = torch.tensor(bits, dtype=torch.int16, device=scale.device) * _SIGN
    marked.view(torch.int16)[:ROWS, 0] |= signs
    return marked


def split_exponent(scale: Tensor) -> tuple[Tensor, int]:
    """Undo `with_exponent`: return scales without signs, and the exponent."""
    # Nobody can read numbers off a stand-in.
    signs = [] if scale.is_meta or not scale.numel() else scale[:ROWS, 0].signbit().tolist()
    if not any(signs):
        return scale, 0
    value = sum(1 << at for at, is_set in enumerate(signs) if is_set)
    return scale.abs(), STEP * (value - (1 << ROWS) * (value >> (ROWS - 1)))
