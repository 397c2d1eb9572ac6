"""AutoRound's AutoScheme: first-order change of the loss; all experts of a layer share a format.

    cost       Σ |g ΔW| of a matrix in a format
    ties       all matrices of a layer, as its runtimes ask
    allocator  the knapsack

The score of a matrix at one format contains its rounding error; `Scored`'s base contains the
distortion of every format, so that error is counted twice. The ranking is the authors'.

Not reproduced: gradients of the text's own loss at the model in the format; see `AutoRoundScore`.
The share of quantized activations is left out.

Source: Intel AutoRound, AutoScheme (delta loss) of its code; Cheng et al., SignRoundV2, arXiv
2512.04746. Eq. 3 of SignRoundV2 is the score, as an account of that paper numbers it; its text was
not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from bitknap.allocation import CostTable, Format
from bitknap.allocation.problem.arrays import Floats
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.published.rule import (
    FORMATS,
    Material,
    Rule,
    each_format,
    solved,
)
from bitknap.estimators.signals.unit_statistics import USUAL, by_stack, curvature, rounding_error
from bitknap.progress import Progress


@dataclass(frozen=True, slots=True)
class AutoRoundScore:
    """Mean over a matrix's weights of |g| |ΔW|, with the root of the curvature for |g|.

    AutoScheme sums |g ΔW| with gradients of the text's own loss. Those are not recorded, so the
    root mean square gradient of a token with labels drawn from the model STANDS IN for |g|: it has
    no sign to cancel over tokens and is never 0 at a minimum, so the ranking is similar, but
    the numbers differ. It is the mean and not the sum because the base of `Scored` already
    counts weights.

    Attributes:
        format: the format that rounds the weights.

    Source: AutoRound's AutoScheme (delta loss).
    """

    format: Format = USUAL
    name = "autoround"
    needs = frozenset({"curvature"})

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U].

        Raises:
            InputError: gradients were not recorded, a unit is not a routed expert's, or the
                format rounds nothing.
        """

        def statistic(run: np.ndarray) -> Tensor:
            error = rounding_error(evidence.weights(run), self.format)
            return (curvature(evidence, run).sqrt() * error.abs()).mean((1, 2))

        return by_stack(evidence, statistic)


def first_order(evidence: Evidence, formats: Sequence[Format]) -> CostTable:
    """Return Σ |g ΔW| of every unit, root mean square gradients standing in for |g|.

    AutoRound's AutoScheme uses this sum; mlx-lm's `dynamic_quant` keeps the sign of g ΔW, with
    gradients of the KL to the original. Neither kind of gradient is recorded.
    """
    table = each_format(evidence, formats, AutoRoundScore, "first-order")
    return replace(table, cost=table.cost * evidence.units.numel[:, None])


def rule(material: Material, progress: Progress | None = None) -> Rule:
    """Return the rule; it takes a byte limit."""
    return solved("autoround", first_order(material.evidence, FORMATS))
