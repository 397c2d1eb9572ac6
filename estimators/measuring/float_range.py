"""float32 where squares fit its range, float64 where they would overflow or vanish.

Weights and activations of a model may have any magnitude that float32 holds, but their squares and
products of squares may leave it. Ordinary numbers are computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers between these, or 0, have squares whose products stay in range.
_LEAST, _MOST = 2.0**-50, 2.0**50


def fits(x: Tensor) -> bool:
    """Return whether the largest number of each x[i] can be squared in float32."""
    if not x.numel():
        return True
    low, high = x.flatten(1).aminmax(dim=1) if x.ndim > 1 else (x, x)
    peak = torch.maximum(-low, high)
    return bool(((peak == 0) | ((peak >= _LEAST) & (peak <= _MOST))).all())


def narrowed(x: Tensor) -> Tensor:
    """Return x in float32 if numbers of that size fit, else in float64."""
    return x.float() if fits(x) else x.double()


def weighed_squares(delta: Tensor, weight: Tensor) -> Tensor:
    """Return delta² × weight, broadcast if needed, in a dtype that holds the result.

    Args:
        delta: [n, ...], float32.
        weight: weight of each square, float32 or, from `narrowed`, float64.
    """
    if weight.dtype == torch.float64 or not fits(delta):
        return delta.double().square() * weight
    return delta.square() * weight


def second_moments(x: Tensor) -> Tensor:
    """Return xᵀ x of rows [n, cols], float32 or float64."""
    rows = narrowed(x[None])[0]
    return rows.T @ rows


def squares_product(g: Tensor, x: Tensor) -> Tensor:
    """Return (g²)ᵀ x² of rows [n, out] and [n, in], float32 or float64."""
    g, x = narrowed(g[None])[0], narrowed(x[None])[0]
    sizes = (float(g.abs().max()) * float(x.abs().max())) if g.numel() and x.numel() else 0.0
    if g.dtype == x.dtype == torch.float32 and (not sizes or _LEAST <= sizes <= _MOST):
        return g.square().T @ x.square()
    return g.double().square().T @ x.double().square()


def added(stack: Tensor, at: int, part: Tensor) -> Tensor:
    """Add to stack[at] in place; return the stack, converted to float64 once a part is float64."""
    wide = stack.double() if part.dtype == torch.float64 else stack
    wide[at] += part
    return wide
