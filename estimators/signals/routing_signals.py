"""Signals that know nothing of weights: constants, chance, and what the router does.

Frequency and routing weight give frequent experts more bits. They are already inside any measured
output error, so they belong on the data-free base only (methods.md#pitfalls, pitfalls 1 and 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bitknap.allocation.problem.arrays import Floats
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence, LayerEvidence
from bitknap.estimators.signals.unit_statistics import by_expert


@dataclass(frozen=True, slots=True)
class Uniform:
    """Score 1 everywhere: the data-free base as it is."""

    name = "uniform"
    needs: frozenset[str] = frozenset()

    def score(self, evidence: Evidence) -> Floats:
        """Return ones, float64[U]."""
        return np.ones(len(evidence.units))


@dataclass(frozen=True, slots=True)
class RandomScore:
    """Log-normal scores drawn for each unit: what a signal without information is worth.

    Attributes:
        seed: of the scores.
    """

    seed: int = 0
    name = "random"
    needs: frozenset[str] = frozenset()

    def score(self, evidence: Evidence) -> Floats:
        """Return exp of standard normal numbers, float64[U]."""
        return np.exp(np.random.default_rng(self.seed).standard_normal(len(evidence.units)))


@dataclass(frozen=True, slots=True)
class Frequency:
    """Share of tokens routed to the unit's expert, shrunk; 1 for what every token passes.

    Source: the frequency baseline of MC-MoE, arXiv 2410.06270, and of many others.
    """

    name = "frequency"
    needs = frozenset({"moments"})

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U].

        Raises:
            InputError: the evidence is of weights alone.
        """
        return by_expert(evidence, lambda layer: layer.shrunk(layer.count))


@dataclass(frozen=True, slots=True)
class RoutingWeight:
    """Summed routing weights of the unit's expert a token of the text, shrunk; 1 if not routed.

    Weights are those the experts are called with, renormalised where the model does so. MC-MoE
    sums them before that, which a pass through the experts does not see.

    Source: MC-MoE, arXiv 2410.06270, w.
    """

    name = "routing-weight"
    needs = frozenset({"moments"})

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U].

        Raises:
            InputError: the evidence is of weights alone.
        """
        return by_expert(evidence, lambda layer: layer.shrunk(layer.gate_sum))


@dataclass(frozen=True, slots=True)
class McMoe:
    """MC-MoE's significance φ^alpha w^beta, shares of its layer times E, without its error.

    So an average expert scores 1 in every layer, as does what is not routed; the paper takes
    shares, layer by layer, where a factor changes nothing. See `RoutingWeight` for w, and
    `mc_moe_cost` for the whole rule on measured errors.

    Attributes:
        alpha: exponent of the frequency.
        beta: exponent of the routing weight.

    Source: MC-MoE, arXiv 2410.06270; exponents are its code's defaults.
    """

    alpha: float = 1.0
    beta: float = 1.5
    name = "mc-moe"
    needs = frozenset({"moments"})

    def __post_init__(self) -> None:
        if not np.isfinite([self.alpha, self.beta]).all():
            raise InputError(f"mc-moe: exponents {self.alpha} and {self.beta} must be finite")

    def score(self, evidence: Evidence) -> Floats:
        """Return the scores, float64[U].

        Raises:
            InputError: the evidence is of weights alone.
        """

        def significance(layer: LayerEvidence) -> Tensor:
            frequency = layer.shrunk(layer.count)
            weight = layer.shrunk(layer.gate_sum)
            relative = frequency / frequency.mean(), weight / weight.mean()
            return relative[0] ** self.alpha * relative[1] ** self.beta

        return by_expert(evidence, significance)
