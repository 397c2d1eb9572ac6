"""Signals of rounding errors and curvature, one number a unit at one format.

`Owq`, `AutoRoundScore` and `Exl2Score` hold the rounding error of one format; on `Scored`'s base,
which holds the distortion of every format, that error is counted twice. They are here to rank as
their authors rank; for costs take `SecondMoments` or `Fisher`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.format import Format
from bitknap.errors import InputError
from bitknap.estimators.costs.weighed_errors import projection_of, role_of
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.signals.unit_statistics import (
    curvature,
    input_square,
    positive,
    rounding_error,
    seen,
)
from bitknap.quantization.stacks.apply import stacks

# The usual 3-bit format of weight-only papers.
_USUAL = Format(3, 128)


@dataclass(frozen=True, slots=True)
class HessianTrace:
    """HAWQ's mean Hessian trace of a matrix.

    Without curvature, the Hessian of a projection's own squared output error, 2 E[a² x xᵀ]: its
    mean trace is twice the mean square of the inputs, so it compares experts of one projection
    well, and gate or up with down hardly, since their outputs are different things. With
    curvature, the mean squared gradient of its weights (empirical Fisher, labels from the model).

    Attributes:
        curvature: take recorded gradients; routed experts only.

    Source: HAWQ-V2, arXiv 1911.03852; theirs is Hutchinson's estimate of the loss Hessian.
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

        return _by_stack(evidence, statistic)


@dataclass(frozen=True, slots=True)
class Owq:
    """Mean over the worst input columns of λ_j ‖ΔW_j‖² / rows, with λ_j = 2 E[a² x_j²].

    OWQ keeps the columns with the largest λ_j ‖ΔW_j‖² in fp16 and scores no matrices. Taking the
    mean of the worst ones as a matrix's score is ours.

    Attributes:
        format: that rounds the weights.
        share: of the columns that count as worst, 0 to 1; at least one column.

    Source: OWQ, arXiv 2306.02272.
    """

    format: Format = _USUAL
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

        return _by_stack(evidence, statistic)


@dataclass(frozen=True, slots=True)
class AutoRoundScore:
    """Mean over a matrix's weights of |g| |ΔW|, with the root of the curvature for |g|.

    AutoScheme sums |g ΔW| with gradients of the text's own loss. Those are not recorded, so the
    root mean square gradient of a token with labels drawn from the model STANDS IN for |g|: it has
    no sign to cancel over tokens and is never 0 at a minimum, so the ranking is like theirs in
    kind and not the same number. The mean, not the sum: the base of `Scored` counts weights.

    Attributes:
        format: that rounds the weights.

    Source: AutoRound's AutoScheme (delta loss).
    """

    format: Format = _USUAL
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

        return _by_stack(evidence, statistic)


@dataclass(frozen=True, slots=True)
class Exl2Score:
    """Relative output error ‖ΔW x‖ / ‖W x‖ of a matrix over its calibration inputs.

    ExLlamaV2 measures whole modules, all experts of a layer as one; by matrix is ours. Root of
    tr(ΔW S ΔWᵀ) / tr(W S Wᵀ), S the second moments of the inputs.

    Attributes:
        format: that rounds the weights.
        full: whole matrices S, routed experts only; otherwise their diagonals, inputs taken as
            uncorrelated.

    Source: ExLlamaV2's measurement pass.
    """

    format: Format = _USUAL
    full: bool = False
    name = "exl2"

    @property
    def needs(self) -> frozenset[str]:
        """Moments, whole matrices of them if `full`."""
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

        return _by_stack(evidence, statistic)

    def _energy(self, evidence: Evidence, run: np.ndarray) -> Callable[[Tensor], Tensor]:
        """Return what maps matrices [n, rows, cols] to their mean squared output [n]."""
        if not self.full:
            columns = input_square(evidence, run)
            return lambda matrix: (matrix.square().sum(1) * columns).sum(1)
        if role_of(evidence.units, run) != "routed":
            label = evidence.units.label(int(run[0]))
            raise InputError(f"{label}: full moments are those of routed experts; use full=False")
        layer, experts = seen(evidence, run)
        down = projection_of(evidence.units, run) == "down"
        found = layer.middle_full if down else layer.input_full
        if found is None:
            raise InputError("full second moments were not recorded; calibrate with full=True")
        moments = layer.shrunk(found)[experts]
        return lambda matrix: ((matrix @ moments) * matrix).sum((1, 2))


def _by_stack(evidence: Evidence, statistic: Callable[[np.ndarray], Tensor]) -> Floats:
    """Return a statistic of each unit of each stack, raised above 0, float64[U]."""
    score = np.zeros(len(evidence.units))
    for run in stacks(evidence.units):
        score[run] = statistic(run).double().numpy()
    return positive(score)
