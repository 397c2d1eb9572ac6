"""Signals without a published rule: constants, random scores, and plain statistics of weights.

Rotating the weights changes statistics of weights alone: compute them after a rotation. Published
signals are in `bitknap.estimators.published`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.arrays import Floats
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.signals.unit_statistics import by_matrix, positive
from bitknap.names import check_name


@dataclass(frozen=True, slots=True)
class Uniform:
    """Score 1 for every unit: the data-free base unchanged."""

    name = "uniform"
    needs: frozenset[str] = frozenset()

    def score(self, evidence: Evidence) -> Floats:
        """Return ones, float64[U]."""
        return np.ones(len(evidence.units))


@dataclass(frozen=True, slots=True)
class RandomScore:
    """Random log-normal scores: the baseline of a signal without information.

    Attributes:
        seed: random seed of the scores.
    """

    seed: int = 0
    name = "random"
    needs: frozenset[str] = frozenset()

    def score(self, evidence: Evidence) -> Floats:
        """Return exp of standard normal numbers, float64[U]."""
        return np.exp(np.random.default_rng(self.seed).standard_normal(len(evidence.units)))


@dataclass(frozen=True, slots=True)
class Kurtosis:
    """Fourth central moment of a matrix's weights over the squared variance; 3 for Gaussian ones.

    Source: the feature that ranked best in baa.ai's study of a 512-expert model; Pearson's
        definition
    over the whole matrix is Bitknap's choice.
    """

    name = "kurtosis"
    needs: frozenset[str] = frozenset()

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U], from 1."""

        def statistic(weights: Tensor) -> Tensor:
            centre = weights - weights.mean((1, 2), keepdim=True)
            variance = centre.square().mean((1, 2))
            fourth = centre.square().square().mean((1, 2))
            return torch.where(variance > 0, fourth / variance.square().clamp_min(1e-300), 3.0)

        return by_matrix(evidence, statistic)


_Statistic = Literal["mean", "spread", "peak"]


@dataclass(frozen=True, slots=True)
class RowVariance:
    """A statistic of the row variances of each unit's own matrix.

    These are Bitknap's own features, for comparison with MaxVar; no paper proposes them.

    Attributes:
        statistic: "mean" of the row variances; "spread", their standard deviation over their
            mean; "peak", the largest over the mean.
    """

    statistic: _Statistic = "mean"
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        check_name("statistic", self.statistic, get_args(_Statistic))

    @property
    def name(self) -> str:
        """The name on the command line."""
        return f"row-variance-{self.statistic}"

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U]."""
        return positive(by_matrix(evidence, self._of))

    def _of(self, weights: Tensor) -> Tensor:
        variance = weights.var(2, correction=0)
        mean = variance.mean(1)
        if self.statistic == "mean":
            return mean
        part = variance.std(1, correction=0) if self.statistic == "spread" else variance.amax(1)
        # The rows of a zero matrix are all equal.
        alike = 0.0 if self.statistic == "spread" else 1.0
        return torch.where(mean > 0, part / mean.clamp_min(1e-300), alike)
