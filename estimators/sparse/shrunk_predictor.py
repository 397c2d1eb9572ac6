"""A predictor that is followed as far as it predicts left-out units.

Residuals over a good base are mostly noise of single measurements: followed in full they make
plans worse than the base alone. Each unit is left out in turn, and its measurements are regressed
on its predictions; the slope, from 0 to 1, is how far predictions are followed. Samples are
weighted by the square root of their loss, since a plan's loss is a sum, not a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitknap.allocation.problem.arrays import Bools, Floats, numbered
from bitknap.estimators.sparse.cell_features import Antecedents, Fitted, Predictor, nats
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.estimators.sparse.predictors import left_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """Another predictor, with predictions shrunk to the samples' mean by cross-validation.

    Attributes:
        inner: learns the samples.
        weight: weight of every sample, float64[N]; the square root of its loss when not given.
    """

    inner: Predictor
    weight: Floats | None = None

    def fit(
        self, samples: LossSamples, antecedents: Antecedents, target: Floats | None = None
    ) -> FittedShrunk:
        """Fit the inner predictor, and how far to follow it."""
        values = samples.logs if target is None else target
        weight = np.sqrt(samples.believed) if self.weight is None else self.weight
        weight = weight / weight.sum()

        def learn(kept: Bools) -> Floats:
            some = self.inner.fit(samples.pick(kept), antecedents, values[kept])
            predicted: Floats = some.logs(antecedents)[0][samples.unit, samples.column]
            return predicted

        group = numbered(samples.unit).astype(np.int64)
        guess = left_out(values, group, learn) + values
        centre, middle = float(weight @ values), float(weight @ guess)
        off, away = values - centre, guess - middle
        scale = float(weight @ away**2)
        trust = float(np.clip(weight @ (away * off) / scale, 0, 1)) if scale > 0 else 0.0
        left = float(np.sqrt(weight @ (off - trust * away) ** 2))
        inner = self.inner.fit(samples, antecedents, values)
        return FittedShrunk(inner=inner, trust=trust, centre=centre, middle=middle, left=left)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedShrunk:
    """A fitted predictor and how far it is followed.

    Attributes:
        inner: the fitted predictor.
        trust: share of a prediction's deviation from `middle` that is kept, 0 to 1.
        centre: weighted mean of the samples, to which predictions are shrunk.
        middle: weighted mean of the predictions of left-out units.
        left: weighted deviation of the samples from the shrunk predictions.
    """

    inner: Fitted
    trust: float
    centre: float
    middle: float
    left: float

    @property
    def note(self) -> str:
        """The inner predictor's note, and how far it is followed."""
        own = getattr(self.inner, "note", "")
        return "; ".join(filter(None, (own, f"followed by {self.trust:.2f}, by cross-validation")))

    def logs(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return mean and deviation of the logarithm."""
        mean, spread = self.inner.logs(antecedents)
        unsure = np.hypot(self.trust * spread, self.left)
        return self.centre + self.trust * (mean - self.middle), unsure

    def predict(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return loss and spread."""
        return nats(*self.logs(antecedents))
