"""Rung A in weight space: half the diagonal empirical Fisher times ΔW², labels from the model.

With labels drawn from the model, the expected squared gradient is the curvature of the KL to the
unchanged model, so ½ Σ F ΔW² is its second-order expansion (methods.md 9.1 A; HAWQ's trace and
GEMQ's g² dz² are coarser forms). Squares are taken per token, before summing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bitknap.allocation.format import Format
from bitknap.allocation.table import CostTable
from bitknap.errors import InputError
from bitknap.estimators.costs import Charge, experts_of, projection_of, role_of, weighed_table
from bitknap.estimators.evidence import Evidence


@dataclass(frozen=True, slots=True)
class Fisher:
    """Diagonal empirical Fisher of every weight × its squared rounding error."""

    name = "fisher"
    needs = frozenset({"curvature"})

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the costs of every unit in every format, nats per token.

        Raises:
            InputError: gradients were not recorded, or a unit is not a routed expert's.
        """

        def weigh(run: np.ndarray, weights: Tensor) -> Charge:
            if role_of(evidence.units, run) != "routed":
                raise InputError("fisher covers routed experts only; use moments with --include")
            layer, experts = experts_of(evidence, run)
            if not layer.curvature:
                raise InputError("gradients were not recorded; calibrate with curvature=True")
            squares = layer.curvature[projection_of(evidence.units, run)]
            grid = 0.5 * layer.shrunk(squares)[experts].float()
            return lambda delta: (delta.square() * grid).sum((1, 2))

        return weighed_table(evidence, formats, weigh, {"estimator": self.name})
