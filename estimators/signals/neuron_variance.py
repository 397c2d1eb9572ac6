"""Variance of neurons: what a look at the rows of a matrix says of its range.

A neuron is an output row of a matrix. MaxVar is the second signal of Chowdhury et al.: a row whose
weights vary much has a wide range, and one grid step of it is large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.arrays import Floats
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.signals.unit_statistics import by_matrix, positive, routed

_Statistic = Literal["mean", "spread", "peak"]


def max_variance(weights: Tensor, largest_norm: bool = False) -> Tensor:
    """Return MaxVar of each matrix: the largest population variance of its rows, float64 [n].

    Args:
        weights: [n, rows, cols].
        largest_norm: instead the unbiased variance of the row with the largest L2 norm, as the
            authors' Mixtral code computes it; nearly the same where row means are near 0.

    Source: Chowdhury et al., arXiv 2604.06515, and its code.
    """
    rows = weights.double()
    if not largest_norm:
        return rows.var(2, correction=0).amax(1)
    longest = torch.linalg.vector_norm(rows, dim=2).argmax(1)
    chosen = rows[torch.arange(len(rows)), longest]
    return chosen.var(1, correction=1 if rows.shape[2] > 1 else 0)


@dataclass(frozen=True, slots=True)
class MaxVar:
    """The largest variance of a neuron, of the expert's first FFN matrix for all of its matrices.

    The first matrix is gate, or up where there is no gate. Units that are no routed experts have
    that of their own matrix. The base of `Scored` holds the mean variance already.

    Attributes:
        first_only: False gives every matrix its own, which the paper does not do.
        largest_norm: see `max_variance`.

    Source: Chowdhury et al., arXiv 2604.06515.
    """

    first_only: bool = True
    largest_norm: bool = False
    name = "max-var"
    needs: frozenset[str] = frozenset()

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U], in squared weights."""
        own = by_matrix(evidence, lambda weights: max_variance(weights, self.largest_norm))
        return positive(_of_first(evidence, own) if self.first_only else own)


def _of_first(evidence: Evidence, own: Floats) -> Floats:
    """Return the values with those of an expert's first matrix on all of its matrices."""
    units, values = evidence.units, own.copy()
    experts = routed(units)
    for layer in evidence.layout.layers:
        here = np.flatnonzero(experts & (units.layer == layer.layer))
        first = units.projections.index("gate" if layer.gated else "up")
        source = here[units.projection[here] == first]
        of_expert = np.zeros(layer.experts)
        of_expert[units.expert[source]] = own[source]
        values[here] = of_expert[units.expert[here]]
    return values


def max_variances(evidence: Evidence, *, largest_norm: bool = False) -> dict[int, Floats]:
    """Return MaxVar of every expert by layer, float64[E] each, of its first FFN matrix."""
    units = evidence.units
    found = {}
    for layer in evidence.layout.layers:
        first = units.projections.index("gate" if layer.gated else "up")
        here = routed(units) & (units.layer == layer.layer) & (units.projection == first)
        run = np.flatnonzero(here)
        run = run[np.argsort(units.expert[run])]
        weights = evidence.weights(run).split(1)  # one at a time: rows are read in float64
        found[layer.layer] = torch.cat([max_variance(w, largest_norm) for w in weights]).numpy()
    return found


@dataclass(frozen=True, slots=True)
class RowVariance:
    """A statistic of the variances of a matrix's rows, each of its own matrix.

    Our own features, for comparison with MaxVar: no paper proposes them as they are.

    Attributes:
        statistic: "mean" of the row variances; "spread", their standard deviation over their
            mean; "peak", the largest over the mean.
    """

    statistic: _Statistic = "mean"
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        known = get_args(_Statistic)
        if self.statistic not in known:
            raise InputError(f"statistic: {self.statistic!r} is not one of {', '.join(known)}")

    @property
    def name(self) -> str:
        """What the CLI calls it."""
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
        # A matrix of zeros has rows that are all alike.
        alike = 0.0 if self.statistic == "spread" else 1.0
        return torch.where(mean > 0, part / mean.clamp_min(1e-300), alike)
