"""Estimators of signals: costs in proportion to a score, and scores made comparable.

`Scored` makes a cost table from one signal: the data-free base × (score / mean) to an exponent. So
all signals use the same distortion of the same formats and differ only in how they rank units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import Units
from bitknap.errors import InputError
from bitknap.estimators.costs.data_free import DataFree
from bitknap.estimators.costs.weighed_errors import token_share
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.signals.signal import Signal

# Scores with less relative spread within a projection than this carry no information.
_ALIKE = 1e-9


@dataclass(frozen=True, slots=True)
class Scored:
    """The data-free base × (score / mean score)^exponent: an estimator of any signal.

    Only ranks: the table's unit is "score" until it is calibrated. A score that already
    contains the weights' variance or a rounding error counts it twice here; an exponent below 1
    reduces that, and a negative one reverses the ranking.

    Attributes:
        signal: scores the units.
        exponent: 0 leaves the base as it is.
    """

    signal: Signal
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if not np.isfinite(self.exponent):
            raise InputError(f"exponent: {self.exponent} is not a finite number")

    @property
    def name(self) -> str:
        """The signal's name, marked as scored."""
        return f"scored({self.signal.name})"

    @property
    def needs(self) -> frozenset[str]:
        """Everything that the signal needs."""
        return self.signal.needs

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return relative costs of every unit in every format.

        Raises:
            InputError: the signal's scores are not one number above 0 for each unit, or the
                evidence lacks what the signal needs.
        """
        table = DataFree().estimate(evidence, formats)
        score = checked(self.signal, evidence)
        factor = (score / score.mean()) ** self.exponent
        provenance = {
            **table.provenance,
            "estimator": self.name,
            "unit": "score",
            "exponent": self.exponent,
        }
        frequency = token_share(evidence) if evidence.layers else table.frequency
        return replace(
            table, cost=table.cost * factor[:, None], frequency=frequency, provenance=provenance
        )


def checked(signal: Signal, evidence: Evidence) -> Floats:
    """Return a signal's scores after checking them, float64[U].

    Raises:
        InputError: another shape, or a score that is not a finite number above 0.
    """
    score = np.asarray(signal.score(evidence), dtype=np.float64)
    units = evidence.units
    if score.shape != (len(units),):
        raise InputError(f"{signal.name}: scores of shape {score.shape}, expected ({len(units)},)")
    wrong = ~(np.isfinite(score) & (score > 0))
    if wrong.any():
        unit = int(wrong.argmax())
        raise InputError(
            f"{signal.name}: {units.label(unit)} scores {score[unit]}; a score is a finite "
            "number above 0"
        )
    return score


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Standardised:
    """Scores made comparable between signals.

    Attributes:
        values: log scores with mean 0 and standard deviation 1 within each projection, float64[U].
        constant: projections whose scores are all equal; their values are all 0.
    """

    values: Floats
    constant: tuple[str, ...]


def standardised(score: Floats, units: Units) -> Standardised:
    """Return log scores centred and scaled within each projection.

    Args:
        score: above 0, float64[U].
        units: the units, with their projections.

    Raises:
        InputError: another shape, or a score that is not a finite number above 0.
    """
    given = np.asarray(score, dtype=np.float64)
    if given.shape != (len(units),) or not (np.isfinite(given) & (given > 0)).all():
        raise InputError(f"score: must be {len(units)} finite numbers above 0")
    values, constant = centred(np.log(given), units.projection.astype(np.int64))
    return Standardised(
        values=values, constant=tuple(units.projections[group] for group in constant)
    )


def centred(values: Floats, group: np.ndarray) -> tuple[Floats, list[int]]:
    """Return values with mean 0 and deviation 1 in each group, and the groups without spread.

    Args:
        values: float64[N].
        group: int64[N], from 0.
    """
    size = np.maximum(np.bincount(group), 1)
    mean = (np.bincount(group, values) / size)[group]
    spread = np.sqrt(np.bincount(group, (values - mean) ** 2) / size)
    flat = spread <= _ALIKE * np.maximum(1, np.bincount(group, np.abs(values)) / size)
    scaled = np.where(flat[group], 0.0, (values - mean) / np.where(flat, 1.0, spread)[group])
    return scaled, sorted(set(group[flat[group]].tolist()))
