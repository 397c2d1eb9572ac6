"""Rung D: routing mass × squared weight error; the input is assumed to be white."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.estimators.costs.weighed_errors import Charge, experts_of, role_of, weighed_table
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.measuring.float_range import weighed_squares


@dataclass(frozen=True, slots=True)
class WeightError:
    """Routing mass Σ a² / T × the input's mean square × ‖ΔW‖² × the layer's gain (rung D)."""

    name = "weight-error"
    needs = frozenset({"moments"})

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the costs of every unit in every format, nats per token."""

        def weigh(run: np.ndarray, weights: Tensor) -> Charge:
            mass = torch.ones(len(run), dtype=torch.float64)
            if role_of(evidence.units, run) == "routed":
                layer, experts = experts_of(evidence, run)
                size = layer.input_square.sum() / layer.gate_square.sum().clamp_min(1e-30)
                white = size / layer.input_square.shape[1]
                mass = layer.shrunk(layer.gate_square)[experts] * white * layer.gain
            one = torch.ones(())
            there = mass.to(weights.device)
            return lambda delta: weighed_squares(delta, one).sum((1, 2)).double() * there

        return weighed_table(evidence, formats, weigh, {"estimator": self.name})
