"""Matrices of any magnitude: a power of two brings them into the range of fp16 scales.

Multiplying by a power of two is exact, and rounding to a grid does not depend on the unit of
weights, so a matrix loses the same at any magnitude. Ordinary matrices have no factor. See
`kernels.layout.exponents` for how the exponent is stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitknap.kernels.layout.exponents import MOST, STEP, power
from bitknap.quantization.rounding.grid import Quantized

# Range of the largest absolute weight of ordinary matrices. Below it, steps of 8 bits are subnormal
# fp16 numbers; above it, values of code 0 come near the largest fp16.
_ORDINARY = 2.0**-8, 2.0**15
_BELOW = 14  # other matrices are scaled to a largest weight just below 2 to this power


def peaks(weights: Tensor) -> Tensor:
    """Return the largest absolute weight of each matrix [n, rows, cols], float32 [n]."""
    flat = weights.flatten(1)
    low, high = flat.aminmax(dim=1) if flat.shape[1] else (flat.new_zeros(len(flat)),) * 2
    return torch.maximum(-low, high).float()


def exponents_of(largest: Tensor) -> Tensor:
    """Return the exponent of each matrix, int32 [n]; 0 for ordinary ones.

    Args:
        largest: largest absolute weight of each matrix, float32 [n] (`peaks`).
    """
    known = torch.frexp(largest).exponent
    needed = -((_BELOW - known) // STEP) * STEP  # up to a multiple of STEP
    least, most = _ORDINARY
    ordinary = (largest == 0) | ((largest >= least) & (largest <= most))
    return torch.where(ordinary, 0, needed.clamp(-MOST, MOST)).int()


def in_range(
    weights: Tensor, rounded: Callable[[Tensor], Quantized], known: Tensor | None = None
) -> Quantized:
    """Round n matrices [n, rows, cols] after bringing each to an ordinary magnitude.

    Args:
        weights: what to round.
        rounded: rounds n matrices of ordinary magnitude, row after row.
        known: the exponents of the matrices, int32 [n], if `weights` are only some of their rows.
    """
    exponents = exponents_of(peaks(weights)) if known is None else known.to(weights.device)
    if not bool(exponents.any()):
        return rounded(weights)
    quantized = rounded(weights.float() * power(-exponents)[:, None, None])
    return quantized.times_power(exponents.repeat_interleave(weights.shape[1]))
