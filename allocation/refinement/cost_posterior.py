"""The posterior of a cost table given measured plans: correction factors and their uncertainty.

A plan's loss is modelled as the sum of its costs, each times 1 plus several effects: one global,
and one each for the layer, its projection, the expert, the unit, the width, and how scales are
stored. For each pair of consecutive layers, an interaction effect times the geometric mean of their
costs is added. Effects are independent and normal around 0, and losses have normal noise, so
inferring effects from the losses of whole plans is Bayesian linear regression, done in its dual
form: a matrix of plans × plans, whatever the number of units. (Rasmussen and Williams, Gaussian
Processes for Machine Learning, 2006, eq. 2.11 and 2.12; samples by Matheron's rule, Wilson et al.,
arXiv 2002.09309, eq. 9.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

import numpy as np

from bitknap.allocation.problem.arrays import Floats, Ints, numbered
from bitknap.allocation.problem.table import CostTable

# Prior standard deviation of each kind of effect at scale 1: group gains measured one by one miss
# interactions between groups (up to half the loss below 2 bits, methods.md#small-models) and little
# else.
_DEVIATIONS = {
    "all": 1.0,
    "layer": 0.3,
    "projection": 0.3,
    "expert": 0.15,
    "unit": 0.15,
    "width": 0.3,
    "family": 0.15,
}
_PAIRS = 0.3
# Candidates for maximum likelihood: scales of all deviations but the first, and relative noise.
_SCALES = (0.25, 0.5, 1.0, 2.0)
_NOISES = (0.001, 0.003, 0.01, 0.03, 0.1)
# Extra noise, as a share of the loss above the best plan: sums are accurate only near it.
_FAR = 0.3
# Lower bound on a corrected cost, as a share of the cost in the table.
_LEAST = 0.05


class Kind(Protocol):
    """One kind of effects.

    Attributes:
        count: number of effects.
        deviation: prior standard deviation of each effect.
    """

    @property
    def count(self) -> int:
        """Number of effects."""
        ...

    @property
    def deviation(self) -> float:
        """Prior standard deviation of each effect."""
        ...

    def scaled(self, scale: float) -> Kind:
        """Return the same effects with `scale` times the deviation."""
        ...

    def sums(self, cost: Floats, choice: Ints) -> Floats:
        """Return the coefficient of each effect in a plan's loss, float64[count]."""
        ...

    def factor(self, effects: Floats) -> Floats:
        """Return the amounts that effects float64[count] add to cost factors, float64[U,F or 1]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Effects that groups of costs share.

    Attributes:
        of: index of the effect on each cost, int32[U,F].
        count: number of effects.
        deviation: prior standard deviation of each effect.
    """

    of: Ints
    count: int
    deviation: float

    def scaled(self, scale: float) -> Groups:
        """Return the same effects with `scale` times the deviation."""
        return replace(self, deviation=scale * self.deviation)

    def sums(self, cost: Floats, choice: Ints) -> Floats:
        """Return the cost of a plan by group, float64[count]."""
        each = np.arange(len(choice))
        totals = np.zeros(self.count)
        np.add.at(totals, self.of[each, choice], cost[each, choice])
        return totals

    def factor(self, effects: Floats) -> Floats:
        """Return the effect of each cost, float64[U,F]."""
        added: Floats = effects[self.of]
        return added


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Interaction effects of consecutive layers, times sqrt(cost of one × cost of the other).

    An exact solve needs additive costs, so effects enter by their slope at one plan.

    Attributes:
        layer: layer of each unit, from 0, int32[U].
        at: cost of that plan by layer, float64[L], L at least 1.
        deviation: prior standard deviation of each effect.
    """

    layer: Ints
    at: Floats
    deviation: float

    @property
    def count(self) -> int:
        """Number of effects: one less than the number of layers."""
        return len(self.at) - 1

    def scaled(self, scale: float) -> Pairs:
        """Return the same effects with `scale` times the deviation."""
        return replace(self, deviation=scale * self.deviation)

    def sums(self, cost: Floats, choice: Ints) -> Floats:
        """Return the geometric mean of the costs of consecutive layers, float64[count]."""
        layers = by_layer(self.layer, cost, choice)
        means: Floats = np.sqrt(layers[:-1] * layers[1:])
        return means

    def factor(self, effects: Floats) -> Floats:
        """Return the slope for each cost, float64[U,1]."""
        known = np.maximum(self.at, np.finfo(float).tiny)
        slope = np.zeros(len(known))
        slope[:-1] += effects * np.sqrt(known[1:] / known[:-1]) / 2
        slope[1:] += effects * np.sqrt(known[:-1] / known[1:]) / 2
        slopes: Floats = slope[self.layer][:, None]
        return slopes


def by_layer(layer: Ints, cost: Floats, choice: Ints) -> Floats:
    """Return the cost of a plan by layer, float64[L]."""
    each = np.arange(len(choice))
    return np.bincount(layer, weights=cost[each, choice]).astype(np.float64)


def kinds_of(table: CostTable, choice: Ints) -> tuple[Kind, ...]:
    """Return the kinds of effects on a table's costs; the global effect comes first.

    Args:
        table: the costs; forbidden choices count as 0.
        choice: the plan at which interactions of layers are linearised, int32[U].
    """
    units, formats, shape = table.units, table.formats, table.cost.shape
    width = numbered(np.array([item.bits for item in formats]))
    family = numbered(np.array([f"{item.group_size} {item.metadata}" for item in formats]))
    rows = {
        "layer": numbered(units.layer),
        "projection": numbered(units.layer, units.role, units.projection),
        "expert": numbered(units.layer, units.role, units.expert),
        "unit": np.arange(len(units), dtype=np.int32),
    }
    labels = {"all": np.zeros(shape, dtype=np.int32)}
    labels |= {name: np.broadcast_to(label[:, None], shape) for name, label in rows.items()}
    labels |= {"width": np.broadcast_to(width, shape), "family": np.broadcast_to(family, shape)}
    kinds: list[Kind] = [
        Groups(
            of=of,
            count=int(of.max(initial=0)) + 1,
            deviation=_DEVIATIONS[name],
        )
        for name, of in labels.items()
    ]
    layer = np.unique(units.layer, return_inverse=True)[1].astype(np.int32)
    at = by_layer(layer, _finite(table.cost), choice)
    return (*kinds, Pairs(layer=layer, at=at, deviation=_PAIRS))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Posterior:
    """The posterior of cost factors given measured losses of plans.

    Attributes:
        kinds: the effects, with their priors.
        features: by kind, the coefficient of each effect in each plan, float64[N, count].
        inverse: inverse of the plans' covariance, float64[N, N].
        surprise: the losses minus those predicted by the table, float64[N].
        noise: standard deviation of each loss's noise, float64[N].
    """

    kinds: tuple[Kind, ...]
    features: tuple[Floats, ...]
    inverse: Floats
    surprise: Floats
    noise: Floats

    @classmethod
    def of(cls, table: CostTable, choices: Sequence[Ints], losses: Floats) -> Posterior:
        """Return the posterior under the scale and the noise of the highest likelihood.

        Args:
            table: the costs; forbidden choices are ignored.
            choices: the plans, int32[U] each.
            losses: measured loss of each plan, float64[N], N at least 1.
        """
        cost, best = _finite(table.cost), choices[int(np.argmin(losses))]
        first, *rest = kinds_of(table, best)
        features = tuple(
            np.stack([kind.sums(cost, one) for one in choices]) for kind in (first, *rest)
        )
        candidates = []
        for scale, noise in product(_SCALES, _NOISES):
            kinds = (first, *(kind.scaled(scale) for kind in rest))
            candidates.append(cls._under(kinds, features, losses, noise))
        return max(candidates, key=lambda one: one[0])[1]

    @classmethod
    def _under(
        cls, kinds: tuple[Kind, ...], features: tuple[Floats, ...], losses: Floats, noise: float
    ) -> tuple[float, Posterior]:
        """Return the log-likelihood of the losses under a relative noise, and the posterior."""
        each = noise * np.abs(losses) + _FAR * (losses - losses.min()) + np.finfo(float).tiny
        covariance = np.diag(each**2)
        for kind, feature in zip(kinds, features, strict=True):
            covariance += kind.deviation**2 * feature @ feature.T
        inverse = np.linalg.pinv(covariance, hermitian=True)
        surprise = losses - features[0][:, 0]
        logarithm = np.linalg.slogdet(covariance)[1]
        likelihood = -0.5 * float(surprise @ inverse @ surprise + logarithm)
        posterior = cls(
            kinds=kinds, features=features, inverse=inverse, surprise=surprise, noise=each
        )
        return likelihood, posterior

    def mean(self) -> Floats:
        """Return the posterior mean of the factor on each cost, float64[U,F]."""
        return self._factor([np.zeros(kind.count) for kind in self.kinds], self.surprise)

    def sample(self, generator: np.random.Generator) -> Floats:
        """Return cost factors drawn from the posterior, float64[U,F]."""
        drawn = [kind.deviation * generator.standard_normal(kind.count) for kind in self.kinds]
        explained = sum(feature @ one for feature, one in zip(self.features, drawn, strict=True))
        noise = self.noise * generator.standard_normal(len(self.surprise))
        return self._factor(drawn, self.surprise - explained - noise)

    def _factor(self, start: Sequence[Floats], rest: Floats) -> Floats:
        """Return cost factors from effects that leave `rest` of the losses unexplained."""
        weight = self.inverse @ rest
        parts = [
            kind.factor(one + kind.deviation**2 * (feature.T @ weight))
            for kind, feature, one in zip(self.kinds, self.features, start, strict=True)
        ]
        multipliers: Floats = np.maximum(1 + sum(parts), _LEAST)
        return multipliers


def _finite(cost: Floats) -> Floats:
    return np.where(np.isfinite(cost), cost, 0.0)
