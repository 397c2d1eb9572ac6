"""What measured plans say of a cost table: how far each cost is off, and how sure that is.

A plan's loss is taken as the sum of its costs, each times 1 plus some effects: one of all, one of
its layer, of its layer's projection, of its expert, of the unit, of the width and of how scales
are stored; and, for each two layers in a row, an effect times the geometric mean of what the two
cost, for what they do to each other. Effects are independent and normal around 0, a loss is read
with normal noise, so what losses of whole plans say of them is Bayesian linear regression, done in
its dual form: a matrix of plans × plans, whatever the number of units. (Rasmussen and Williams,
Gaussian Processes for Machine Learning, 2006, eq. 2.11 and 2.12; samples by Matheron's rule,
Wilson et al., arXiv 2002.09309, eq. 9.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

import numpy as np

from bitknap.allocation.problem.arrays import Floats, Ints, numbered
from bitknap.allocation.problem.table import CostTable

# Prior deviation of each kind of effect where the scale is 1: group gains measured one by one miss
# what groups do to each other (up to half the loss below 2 bits, methods.md#small-models) and
# little else.
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
# Tried for the likelihood's sake: scales of all deviations but the first, and noise over the loss.
_SCALES = (0.25, 0.5, 1.0, 2.0)
_NOISES = (0.001, 0.003, 0.01, 0.03, 0.1)
# Of what a plan loses beyond the best one: more noise, since sums are only good near by.
_FAR = 0.3
# A cost is never believed to be less than this share of what the table says.
_LEAST = 0.05


class Kind(Protocol):
    """One kind of effects.

    Attributes:
        count: how many there are.
        deviation: deviation of each around 0, before.
    """

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    @property
    def deviation(self) -> float:
        """Of each around 0, before."""
        ...

    def scaled(self, scale: float) -> Kind:
        """Return it with `scale` times the deviation."""
        ...

    def sums(self, cost: Floats, choice: Ints) -> Floats:
        """Return by what each effect is multiplied in a plan's loss, float64[count]."""
        ...

    def factor(self, effects: Floats) -> Floats:
        """Return what effects float64[count] add to the factor of each cost, float64[U,F or 1]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Effects that groups of costs share.

    Attributes:
        of: which effect each cost has, int32[U,F].
        count: how many there are.
        deviation: deviation of each around 0, before.
    """

    of: Ints
    count: int
    deviation: float

    def scaled(self, scale: float) -> Groups:
        """Return it with `scale` times the deviation."""
        return replace(self, deviation=scale * self.deviation)

    def sums(self, cost: Floats, choice: Ints) -> Floats:
        """Return what a plan costs by group, float64[count]."""
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
    """Effects that two layers in a row have together: times sqrt(cost of one × of the other).

    In an exact solve costs must add up, so they count by their slope at a plan.

    Attributes:
        layer: layer of each unit, from 0, int32[U].
        at: what that plan costs by layer, float64[L], L at least 1.
        deviation: deviation of each around 0, before.
    """

    layer: Ints
    at: Floats
    deviation: float

    @property
    def count(self) -> int:
        """One less than there are layers."""
        return len(self.at) - 1

    def scaled(self, scale: float) -> Pairs:
        """Return it with `scale` times the deviation."""
        return replace(self, deviation=scale * self.deviation)

    def sums(self, cost: Floats, choice: Ints) -> Floats:
        """Return the geometric mean of what each two layers cost, float64[count]."""
        layers = by_layer(self.layer, cost, choice)
        means: Floats = np.sqrt(layers[:-1] * layers[1:])
        return means

    def factor(self, effects: Floats) -> Floats:
        """Return the slopes of each cost, float64[U,1]."""
        known = np.maximum(self.at, np.finfo(float).tiny)
        slope = np.zeros(len(known))
        slope[:-1] += effects * np.sqrt(known[1:] / known[:-1]) / 2
        slope[1:] += effects * np.sqrt(known[:-1] / known[1:]) / 2
        slopes: Floats = slope[self.layer][:, None]
        return slopes


def by_layer(layer: Ints, cost: Floats, choice: Ints) -> Floats:
    """Return what a plan costs by layer, float64[L]."""
    each = np.arange(len(choice))
    return np.bincount(layer, weights=cost[each, choice]).astype(np.float64)


def kinds_of(table: CostTable, choice: Ints) -> tuple[Kind, ...]:
    """Return the kinds of effects that a table's costs may have; that of all comes first.

    Args:
        table: the costs; what is forbidden counts nothing.
        choice: the plan that pairs of layers are taken at, int32[U].
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
    """What losses of plans say of a table.

    Attributes:
        kinds: the effects, with what was thought of them before.
        features: by kind, by what each effect is multiplied in each plan, float64[N, count].
        inverse: inverse of the plans' covariance, float64[N, N].
        surprise: the losses, less what the table says, float64[N].
        noise: deviation of each loss's noise, float64[N].
    """

    kinds: tuple[Kind, ...]
    features: tuple[Floats, ...]
    inverse: Floats
    surprise: Floats
    noise: Floats

    @classmethod
    def of(cls, table: CostTable, choices: Sequence[Ints], losses: Floats) -> Posterior:
        """Return what the losses say, under the scale and the noise that make them likeliest.

        Args:
            table: the costs; what is forbidden plays no part.
            choices: the plans, int32[U] each.
            losses: what each was measured to lose, float64[N], N at least 1.
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
        """Return what each cost is to be multiplied by, float64[U,F]."""
        return self._factor([np.zeros(kind.count) for kind in self.kinds], self.surprise)

    def sample(self, generator: np.random.Generator) -> Floats:
        """Return multipliers as likely as they are believed to be, float64[U,F]."""
        drawn = [kind.deviation * generator.standard_normal(kind.count) for kind in self.kinds]
        explained = sum(feature @ one for feature, one in zip(self.features, drawn, strict=True))
        noise = self.noise * generator.standard_normal(len(self.surprise))
        return self._factor(drawn, self.surprise - explained - noise)

    def _factor(self, start: Sequence[Floats], rest: Floats) -> Floats:
        """Return multipliers from effects that leave `rest` of the losses to be explained."""
        weight = self.inverse @ rest
        parts = [
            kind.factor(one + kind.deviation**2 * (feature.T @ weight))
            for kind, feature, one in zip(self.kinds, self.features, start, strict=True)
        ]
        multipliers: Floats = np.maximum(1 + sum(parts), _LEAST)
        return multipliers


def _finite(cost: Floats) -> Floats:
    return np.where(np.isfinite(cost), cost, 0.0)
