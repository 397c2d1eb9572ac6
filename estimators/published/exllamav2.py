"""ExLlamaV2: relative output errors, annealed; all experts of a layer share a format.

    cost       ‖ΔW x‖ / ‖W x‖ of a matrix in a format, over its calibration inputs
    ties       all matrices of a layer: a block of experts is one module there
    allocator  simulated annealing of Σ cost^n

The allocator is in `bitknap.allocation.published.exllamav2`. The score of a matrix at one format
contains its rounding error, which `Scored`'s base counts again.

Not reproduced: the authors measure a module's outputs as a whole and average the ratios of
sequences; here the costs of matrices are added up, each with one ratio over all tokens.

Source: ExLlamaV2's code: `measure_quant`, `optimize` and `sim_anneal`. There is no paper:
`test_error` of the code is the cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation import Format
from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.published import (
    Annealing,
)
from bitknap.errors import InputError
from bitknap.estimators.costs.weighed_errors import (
    projection_of,
    role_of,
)
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.published.rule import (
    FORMATS,
    Material,
    Rule,
    each_format,
    solved,
)
from bitknap.estimators.signals.unit_statistics import (
    USUAL,
    by_stack,
    input_square,
    rounding_error,
    seen,
)
from bitknap.progress import Progress


@dataclass(frozen=True, slots=True)
class Exl2Score:
    """Relative output error ‖ΔW x‖ / ‖W x‖ of a matrix over its calibration inputs.

    ExLlamaV2 measures whole modules, with all experts of a layer as one; scoring single matrices is
    Bitknap's choice. The score is the root of tr(ΔW S ΔWᵀ) / tr(W S Wᵀ), where S is the second
    moments of the inputs.

    Attributes:
        format: the format that rounds the weights.
        full: use whole matrices S, for routed experts only; otherwise their diagonals, which
            assumes uncorrelated inputs.

    Source: ExLlamaV2's measurement pass.
    """

    format: Format = USUAL
    full: bool = False
    name = "exl2"

    @property
    def needs(self) -> frozenset[str]:
        """Moments; whole matrices if `full`."""
        return frozenset({"moments", "full"} if self.full else {"moments"})

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U].

        Raises:
            InputError: the evidence lacks what the signal needs, or the format rounds nothing.
        """

        def statistic(run: np.ndarray) -> Tensor:
            weights = evidence.weights(run)
            energy = self._energy(evidence, run)
            error = energy(rounding_error(weights, self.format))
            whole = energy(weights.double())
            return torch.where(whole > 0, error / whole.clamp_min(1e-300), 0.0).sqrt()

        return by_stack(evidence, statistic)

    def _energy(self, evidence: Evidence, run: np.ndarray) -> Callable[[Tensor], Tensor]:
        """Return a function from matrices [n, rows, cols] to their mean squared outputs [n]."""
        if not self.full:
            columns = input_square(evidence, run)
            return lambda matrix: (matrix.square().sum(1) * columns).sum(1)
        if role_of(evidence.units, run) != "routed":
            label = evidence.units.label(int(run[0]))
            raise InputError(
                f"{label}: full second moments are recorded for routed experts only; use full=False"
            )
        layer, experts = seen(evidence, run)
        down = projection_of(evidence.units, run) == "down"
        recorded = layer.middle_full if down else layer.input_full
        if recorded is None:
            raise InputError("full second moments were not recorded; calibrate with full=True")
        moments = layer.shrunk(recorded)[experts]
        return lambda matrix: ((matrix @ moments) * matrix).sum((1, 2))


def rule(material: Material, progress: Progress | None = None) -> Rule:
    """Return the rule; it takes a byte limit, and each limit needs seconds of annealing."""
    table = each_format(material.evidence, FORMATS, Exl2Score, "exl2")
    return solved("exllamav2", table, Annealing())
