"""HAWQ-V2: mean trace of the Hessian, times the squared rounding error.

    cost       Tr(H) / n × ‖ΔW‖² of a matrix in a format
    ties       none
    allocator  the knapsack; the authors take the least sum on a front of size and cost

Not reproduced: Hutchinson's estimate of the loss Hessian; the Fisher diagonal stands in for it.

Source: Dong et al., HAWQ-V2, NeurIPS 2020, arXiv 1911.03852. Eq. 2.11 is Ω, whose sum the front
compares, as the caption of figure 4 says; the rest of the paper's text was not at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bitknap.allocation import CostTable, Format
from bitknap.allocation.problem.arrays import Floats
from bitknap.estimators.costs.weighed_errors import (
    weighed_table,
)
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.published.rule import (
    FORMATS,
    Material,
    Rule,
    ranked,
    solved,
)
from bitknap.estimators.signals.unit_statistics import by_stack, curvature, input_square
from bitknap.progress import Progress


@dataclass(frozen=True, slots=True)
class HessianTrace:
    """HAWQ's mean Hessian trace of a matrix.

    Without curvature, the Hessian of a projection's own squared output error, 2 E[a² x xᵀ]: its
    mean trace is twice the mean square of the inputs. So it compares experts of one projection
    well, but gate or up with down poorly, since their outputs are different quantities. With
    curvature, the mean squared gradient of its weights (empirical Fisher, labels from the model).

    Attributes:
        curvature: use recorded gradients; routed experts only.

    Source: HAWQ-V2, arXiv 1911.03852; the authors use Hutchinson's estimate of the loss Hessian.
    """

    curvature: bool = False
    name = "hessian-trace"

    @property
    def needs(self) -> frozenset[str]:
        """Gradients, or second moments."""
        return frozenset({"curvature"} if self.curvature else {"moments"})

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U].

        Raises:
            InputError: the evidence lacks what the signal needs.
        """

        def statistic(run: np.ndarray) -> Tensor:
            if self.curvature:
                return curvature(evidence, run).mean((1, 2))
            return 2 * input_square(evidence, run).mean(1)

        return by_stack(evidence, statistic)


def hawq(evidence: Evidence, formats: Sequence[Format]) -> CostTable:
    """Return the mean Hessian trace × ‖ΔW‖² (HAWQ-V2, arXiv 1911.03852), Fisher for Hessian."""
    trace = HessianTrace(curvature=True).score(evidence)
    return ranked(evidence, formats, trace[:, None] * _squared_errors(evidence, formats), "hawq")


def _squared_errors(evidence: Evidence, formats: Sequence[Format]) -> Floats:
    """Return ‖ΔW‖² of every unit in every format, float64[U,F]."""

    def weigh(run: np.ndarray, weights: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda delta: delta.square().sum((1, 2))

    return weighed_table(evidence, formats, weigh, {}).cost


def rule(material: Material, progress: Progress | None = None) -> Rule:
    """Return the rule; it takes a byte limit."""
    return solved("hawq", hawq(material.evidence, FORMATS))
