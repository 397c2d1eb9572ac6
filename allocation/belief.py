"""What measured plans say of a cost table: how far each cost is off, and how sure that is.

A plan's loss is taken as a sum of its costs, each times 1 plus some effects: one of all, one of
its layer, of its layer's projection, of its expert, of the unit, of the width and of how scales
are stored. Effects are independent and normal around 0, a loss is read with normal noise, so what
losses of whole plans say of them is Bayesian linear regression, done in its dual form: a matrix of
plans × plans, whatever the number of units. (Rasmussen and Williams, Gaussian Processes for
Machine Learning, 2006, eq. 2.11 and 2.12; samples by Matheron's rule, Wilson et al.,
arXiv 2002.09309, eq. 9.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from bitknap.allocation.arrays import Floats, Ints, numbered
from bitknap.allocation.table import CostTable

# Prior deviation of each kind of effect where the scale is 1: group gains measured one by one miss
# what groups do to each other (up to half the loss below 2 bits, methods.md 11) and little else.
_DEVIATIONS = {
    "all": 1.0,
    "layer": 0.3,
    "projection": 0.3,
    "expert": 0.15,
    "unit": 0.15,
    "width": 0.3,
    "family": 0.15,
}
# Tried for the likelihood's sake: scales of all deviations but the first, and noise over the loss.
_SCALES = (0.25, 0.5, 1.0, 2.0)
_NOISES = (0.001, 0.003, 0.01, 0.03, 0.1)
# Of what a plan loses beyond the best one: more noise, since sums are only good near by.
_FAR = 0.3
# A cost is never believed to be less than this share of what the table says.
_LEAST = 0.05


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Effects:
    """One kind of effect.

    Attributes:
        of: which effect each cost has, int32[U,F].
        count: how many there are.
        deviation: of each around 0, before.
    """

    of: Ints
    count: int
    deviation: float

    def sums(self, cost: Floats, choice: Ints) -> Floats:
        """Return what a plan costs by effect, float64[count]."""
        each = np.arange(len(choice))
        found = np.zeros(self.count)
        np.add.at(found, self.of[each, choice], cost[each, choice])
        return found


def effects(table: CostTable) -> tuple[Effects, ...]:
    """Return the kinds of effects that a table's costs may have; that of all comes first."""
    units, formats, shape = table.units, table.formats, table.cost.shape
    width = numbered(np.array([item.bits for item in formats]))
    family = numbered(np.array([f"{item.group_size} {item.metadata}" for item in formats]))
    rows = {
        "layer": numbered(units.layer),
        "projection": numbered(units.layer, units.role, units.projection),
        "expert": numbered(units.layer, units.role, units.expert),
        "unit": np.arange(len(units), dtype=np.int32),
    }
    found = {"all": np.zeros(shape, dtype=np.int32)}
    found |= {name: np.broadcast_to(label[:, None], shape) for name, label in rows.items()}
    found |= {"width": np.broadcast_to(width, shape), "family": np.broadcast_to(family, shape)}
    return tuple(
        Effects(
            of=of,
            count=int(of.max(initial=0)) + 1,
            deviation=_DEVIATIONS[name],
        )
        for name, of in found.items()
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Belief:
    """What losses of plans say of a table.

    Attributes:
        kinds: the effects, with what was thought of them before.
        features: by kind, what each measured plan costs by effect, float64[N, count].
        inverse: of the plans' covariance, float64[N, N].
        surprise: the losses, less what the table says, float64[N].
        noise: deviation of each loss's noise, float64[N].
    """

    kinds: tuple[Effects, ...]
    features: tuple[Floats, ...]
    inverse: Floats
    surprise: Floats
    noise: Floats

    @classmethod
    def of(cls, table: CostTable, choices: Ints, losses: Floats) -> Belief:
        """Return what the losses say, under the scale and the noise that make them likeliest.

        Args:
            table: the costs; what is forbidden plays no part.
            choices: the plans, int32[N,U].
            losses: what each was measured to lose, float64[N], N at least 1.
        """
        cost = np.where(np.isfinite(table.cost), table.cost, 0.0)
        known = [
            (kind, np.stack([kind.sums(cost, one) for one in choices])) for kind in effects(table)
        ]
        found = [cls._under(known, losses, *how) for how in product(_SCALES, _NOISES)]
        return max(found, key=lambda one: one[0])[1]

    @classmethod
    def _under(
        cls, known: list[tuple[Effects, Floats]], losses: Floats, scale: float, noise: float
    ) -> tuple[float, Belief]:
        """Return the log-likelihood of the losses under a scale and a relative noise, and why."""
        all_, *rest = known
        kinds = (all_[0], *(replace(kind, deviation=scale * kind.deviation) for kind, _ in rest))
        features = tuple(feature for _, feature in known)
        each = noise * np.abs(losses) + _FAR * (losses - losses.min()) + np.finfo(float).tiny
        covariance = np.diag(each**2)
        for kind, feature in zip(kinds, features, strict=True):
            covariance += kind.deviation**2 * feature @ feature.T
        inverse = np.linalg.pinv(covariance, hermitian=True)
        surprise = losses - features[0][:, 0]
        logarithm = np.linalg.slogdet(covariance)[1]
        likelihood = -0.5 * float(surprise @ inverse @ surprise + logarithm)
        belief = cls(kinds=kinds, features=features, inverse=inverse, surprise=surprise, noise=each)
        return likelihood, belief

    def mean(self) -> Floats:
        """Return what each cost is to be multiplied by, float64[U,F]."""
        return self._factor([0.0 * feature[0] for feature in self.features], self.surprise)

    def sample(self, generator: np.random.Generator) -> Floats:
        """Return multipliers as likely as they are believed to be, float64[U,F]."""
        drawn = [kind.deviation * generator.standard_normal(kind.count) for kind in self.kinds]
        told = sum(feature @ one for feature, one in zip(self.features, drawn, strict=True))
        noise = self.noise * generator.standard_normal(len(self.surprise))
        return self._factor(drawn, self.surprise - told - noise)

    def _factor(self, start: list[Floats], rest: Floats) -> Floats:
        """Return multipliers from effects that leave `rest` of the losses to be explained."""
        weight = self.inverse @ rest
        factor = np.ones(self.kinds[0].of.shape)
        for kind, feature, one in zip(self.kinds, self.features, start, strict=True):
            factor += (one + kind.deviation**2 * (feature.T @ weight))[kind.of]
        return np.maximum(factor, _LEAST)
