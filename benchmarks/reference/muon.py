"""Muon for stacks of matrices: momentum, orthogonalised by Newton-Schulz.

torch.optim.Muon takes 2-D parameters only; expert weights are 3-D. Source: Jordan et al. 2024,
"Muon: an optimizer for hidden layers in neural networks" (the quintic iteration's coefficients).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrices to `g` [..., m, n], approximately."""
    wide = g.shape[-2] > g.shape[-1]
    x: Tensor = g.mT if wide else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if wide else x


class StackedMuon(torch.optim.Optimizer):
    """Muon over parameters [m, n] or [experts, m, n]; `halves` = 2 splits a fused gate_up."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay, "halves": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step on every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(buffer, group["momentum"])  # Nesterov
                m, n = p.shape[-2] // group["halves"], p.shape[-1]
                update = orthogonalise(g.reshape(-1, m, n)).reshape(p.shape)
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, m / n) ** 0.5)
