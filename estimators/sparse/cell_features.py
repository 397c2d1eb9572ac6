"""Features of cells that are known without measuring, and the protocol of predictors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bitknap.allocation.problem.arrays import Bools, Floats, frozen
from bitknap.errors import InputError
from bitknap.estimators.sparse.measured_cells import LossSamples
from bitknap.names import check_name

# Deviations of logarithms are capped at this value.
_WIDEST = 5.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Antecedents:
    """Features of every unit in every format that are known without measuring.

    Attributes:
        names: D distinct names.
        values: float64[U,F,D], larger = more loss; categories as whole numbers.
        discrete: names of the categories.
        free: names whose direction is not known in advance and is learned from the samples.
    """

    names: tuple[str, ...]
    values: Floats
    discrete: frozenset[str] = frozenset()
    free: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        values = frozen("values", self.values, np.float64)
        if values.ndim != 3 or values.shape[2] != len(set(self.names)) or not values.size:
            raise InputError(
                f"values: shape {values.shape}, expected [units, formats, {len(self.names)}] "
                "and distinct names"
            )
        if not np.isfinite(values).all():
            where = int(np.isfinite(values).all(axis=(0, 1)).argmin())
            raise InputError(f"values: {self.names[where]} has NaN or inf; give finite numbers")
        for name in sorted(self.discrete | self.free):
            check_name("antecedent", name, self.names)
        object.__setattr__(self, "values", values)

    def of(self, samples: LossSamples) -> Floats:
        """Return the antecedents of the samples, float64[N,D].

        Raises:
            InputError: the samples have other units or formats.
        """
        ours, theirs = self.values.shape[:2], (len(samples.units), len(samples.formats))
        if ours != theirs:
            raise InputError(
                f"antecedents: they cover {ours[0]} units × {ours[1]} formats, the samples "
                f"{theirs[0]} × {theirs[1]}; make both for the same units and formats"
            )
        points: Floats = self.values[samples.unit, samples.column]
        return points

    def mask(self, names: frozenset[str]) -> Bools:
        """Return which antecedents have these names, bool[D]."""
        return np.array([name in names for name in self.names], dtype=np.bool_)


class Fitted(Protocol):
    """A fitted predictor."""

    def logs(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return mean and standard deviation of the learned logarithm, float64[U,F] each."""
        ...

    def predict(self, antecedents: Antecedents) -> tuple[Floats, Floats]:
        """Return loss and its spread, nats per token, float64[U,F] each."""
        ...


class Predictor(Protocol):
    """Anything that learns losses from samples."""

    def fit(
        self, samples: LossSamples, antecedents: Antecedents, target: Floats | None = None
    ) -> Fitted:
        """Learn log losses, or `target` float64[N] instead."""
        ...


def nats(mean: Floats, deviation: Floats) -> tuple[Floats, Floats]:
    """Return the loss at a mean logarithm, and its increase when one deviation is added."""
    loss: Floats = np.exp(mean)
    return loss, loss * np.expm1(np.minimum(deviation, _WIDEST))
