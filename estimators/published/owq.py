"""OWQ: the input columns with the largest errors, as a score of matrices; it makes no plans.

    score  mean over the worst columns j of λ_j ‖ΔW_j‖² / rows, with λ_j = 2 E[a² x_j²]

Not reproduced: OWQ keeps those columns in fp16, which no format here does.

Source: Lee et al., OWQ, AAAI 2024, arXiv 2306.02272, and its code. Equation numbers are not given:
the paper was read through its code and accounts of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bitknap.allocation import Format
from bitknap.allocation.problem.arrays import Floats
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.signals.unit_statistics import USUAL, by_stack, input_square, rounding_error


@dataclass(frozen=True, slots=True)
class Owq:
    """Mean over the worst input columns of λ_j ‖ΔW_j‖² / rows, with λ_j = 2 E[a² x_j²].

    OWQ keeps the columns with the largest λ_j ‖ΔW_j‖² in fp16 and scores no matrices. Taking
    the mean of the worst ones as a matrix's score is Bitknap's choice.

    Attributes:
        format: the format that rounds the weights.
        share: share of columns that count as worst, 0 to 1; at least one column counts.

    Source: OWQ, arXiv 2306.02272.
    """

    format: Format = USUAL
    share: float = 0.01
    name = "owq"
    needs = frozenset({"moments"})

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share: {self.share} is not above 0 and at most 1")

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U].

        Raises:
            InputError: the evidence is of weights alone, or the format rounds nothing.
        """

        def statistic(run: np.ndarray) -> Tensor:
            error = rounding_error(evidence.weights(run), self.format).square().mean(1)
            columns = 2 * input_square(evidence, run) * error
            worst = max(1, round(self.share * columns.shape[1]))
            return columns.topk(worst, dim=1).values.mean(1)

        return by_stack(evidence, statistic)
