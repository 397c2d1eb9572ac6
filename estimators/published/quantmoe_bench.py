"""QuantMoE-Bench: outlier columns, as a score of matrices; it makes no plans.

    score  the largest over input columns of max |w| / mean |w|

Rotating the weights changes this statistic: compute it after a rotation.

Not reproduced: its hand-made recipes, such as more bits for first layers and shared experts.

Source: Li et al., QuantMoE-Bench, arXiv 2406.08155, linear outlier score, and its code. Equation
numbers are not given: the paper was read through its code and its abstract.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitknap.allocation.problem.arrays import Floats
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.signals.unit_statistics import by_matrix


@dataclass(frozen=True, slots=True)
class OutlierRatio:
    """The largest over all input columns of max |w| / mean |w|.

    Source: the linear outlier score of QuantMoE-Bench, arXiv 2406.08155.
    """

    name = "outlier-ratio"
    needs: frozenset[str] = frozenset()

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U], from 1."""

        def statistic(weights: Tensor) -> Tensor:
            size = weights.abs()
            mean = size.mean(1)
            ratio = torch.where(mean > 0, size.amax(1) / mean.clamp_min(1e-300), 1.0)
            return ratio.amax(1)

        return by_matrix(evidence, statistic)
