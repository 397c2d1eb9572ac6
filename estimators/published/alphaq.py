"""AlphaQ: the tail of a matrix's spectrum, from weights alone.

    cost       (median alpha / alpha)^gamma × Var(W) × 2^(−2b)
    ties       none
    allocator  the knapsack; the authors also solve one program over all layers, which counts
               matrices

Rotating the weights changes this statistic: compute it after a rotation.

Not reproduced: sub-matrices are evenly spaced, the authors' are random; gamma is 1, where
the authors' script passes 10 to a function whose default is 1.

Source: Yang et al., AlphaQ, arXiv 2606.04980, and its code. A note of the paper takes the cost from
sections 3.2 and 3.3; equation numbers are not given: the paper's text was not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation import CostTable, Format
from bitknap.allocation.problem.arrays import Floats
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.published.rule import (
    FORMATS,
    Material,
    Rule,
    ranked,
    solved,
)
from bitknap.estimators.signals.unit_statistics import by_matrix, positive
from bitknap.progress import Progress


@dataclass(frozen=True, slots=True)
class AlphaQ:
    """(Median alpha / alpha)^gamma, alpha being the power-law tail index of the spectrum.

    Matrices with heavy tails (small alpha) count as well trained and sensitive. The spectra of
    square sub-matrices are pooled (FARMS), so that alpha does not depend on a matrix's shape: tiles
    of `tile` × `tile` side by side, without the remainder at the edges, and at most `most` of them,
    evenly spaced where the paper draws them at random. A matrix smaller than a tile is taken whole,
    and alpha is then not comparable between shapes. The median is over all units.

    alpha = 1 + k / Σ ln(λ_i / λ_k+1) over the k largest eigenvalues λ of the squared tiles: `tail`
    of them all, at least 10 where there are as many (Hill's estimate).

    The paper's cost is this × Var(W) × 2^(−2b); `Scored` uses the formats' real distortion
    instead of the power of two, which is wrong below 4 bits.

    Attributes:
        gamma: exponent of the ratio; 1 by default in the authors' function, 10 in their script.
        tail: share of the eigenvalues that make up the tail, 0 to 1.
        tile: side of a sub-matrix.
        most: maximum number of sub-matrices of one matrix.

    Source: AlphaQ, arXiv 2606.04980, and its code.
    """

    gamma: float = 1.0
    tail: float = 0.1
    tile: int = 128
    most: int = 256
    name = "alphaq"
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not np.isfinite(self.gamma):
            raise InputError(f"gamma: {self.gamma} is not a finite number")
        if not 0 < self.tail < 1:
            raise InputError(f"tail: {self.tail} is not between 0 and 1")
        if self.tile < 2 or self.most < 1:
            raise InputError(f"tile and most: {self.tile} and {self.most} must be at least 2 and 1")

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U]; a matrix with one singular value gets the median."""
        alpha = by_matrix(evidence, self.indices)
        known = np.isfinite(alpha)
        if not known.any():
            return np.ones_like(alpha)
        median = float(np.median(alpha[known]))
        ratio: Floats = (median / np.where(known, alpha, median)) ** self.gamma
        return positive(ratio)

    def indices(self, weights: Tensor) -> Tensor:
        """Return alpha of matrices [n, rows, cols], float64 [n]; NaN if there is no spectrum."""
        return torch.stack([hill(self._spectrum(matrix), self.tail) for matrix in weights])

    def _spectrum(self, matrix: Tensor) -> Tensor:
        if min(matrix.shape) < self.tile:
            return _eigenvalues(matrix)
        tiles = matrix.unfold(0, self.tile, self.tile).unfold(1, self.tile, self.tile)
        tiles = tiles.flatten(0, 1)
        if len(tiles) > self.most:
            tiles = tiles[torch.arange(self.most) * len(tiles) // self.most]
        return _eigenvalues(tiles)


def _eigenvalues(matrices: Tensor) -> Tensor:
    """Return the squared singular values of one or many matrices, pooled, float64."""
    singular: Tensor = torch.linalg.svdvals(matrices)
    return singular.square().flatten()


def hill(values: Tensor, tail: float = 0.1) -> Tensor:
    """Return Hill's estimate of the density exponent of the largest values, float64.

    NaN for fewer than two values, or where the largest are all alike.

    Args:
        values: not negative, [n].
        tail: share of them that make up the tail; at least 10 where there are as many.
    """
    count = len(values)
    if count < 2:
        return torch.tensor(float("nan"), dtype=torch.float64)
    k = min(max(10, int(tail * count)), count - 1)
    logs = values.double().clamp_min(1e-300).log().sort(descending=True).values
    total = (logs[:k] - logs[k]).sum()
    return torch.where(total > 1e-12, 1 + k / total.clamp_min(1e-12), torch.nan)


def alphaq(evidence: Evidence, formats: Sequence[Format]) -> CostTable:
    """Return (median alpha / alpha) × Var(W) × 2^(−2b) (AlphaQ, arXiv 2606.04980)."""
    variance = by_matrix(evidence, lambda weights: weights.var((1, 2), correction=0))
    bits = np.array([format.bits for format in formats])
    score = AlphaQ().score(evidence) * variance
    return ranked(evidence, formats, score[:, None] * 2.0 ** (-2 * bits), "alphaq")


def rule(material: Material, progress: Progress | None = None) -> Rule:
    """Return the rule; it takes a byte limit."""
    return solved("alphaq", alphaq(material.evidence, FORMATS))
