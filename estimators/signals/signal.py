"""Signals: one number a unit that says how sensitive it is, in no unit at all.

A signal only ranks. `Scored` makes a cost table of one: the data-free base × (score / mean) to an
exponent, so that all signals stand on the same distortion of the same formats and differ in what
they say of units alone.

Every score is above 0: an expert without tokens is shrunk to its layer's mean as everywhere
(`LayerEvidence.shrunk`), and a statistic that is 0, such as the variance of a matrix of zeros, is
raised to `LEAST` of the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import ROLES, Units
from bitknap.errors import InputError
from bitknap.estimators.costs.data_free import DataFree
from bitknap.estimators.costs.weighed_errors import (
    experts_of,
    plainest,
    projection_of,
    role_of,
    token_share,
)
from bitknap.estimators.evidence.evidence import Evidence, LayerEvidence
from bitknap.quantization.rounding.methods import round_trip
from bitknap.quantization.stacks.apply import stacks

# Share of the mean that a score of 0 becomes.
LEAST = 1e-6
# Relative spread of scores within a projection below which they say nothing.
_ALIKE = 1e-9
# Weights that a statistic takes up at a time, in float64: 32 MiB.
_CHUNK = 1 << 22


class Signal(Protocol):
    """Anything that scores units.

    Attributes:
        name: what the CLI calls it.
        needs: which evidence it uses: "moments", "full", "curvature"; empty for weights alone.
    """

    @property
    def name(self) -> str:
        """What the CLI calls it."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """What must be recorded."""
        ...

    def score(self, evidence: Evidence) -> Floats:
        """Return a score above 0 for every unit, larger is more sensitive, float64[U]."""
        ...


@dataclass(frozen=True, slots=True)
class Scored:
    """The data-free base × (score / mean score)^exponent: an estimator of any signal.

    Only ranks: the table's unit is "score" until it is calibrated. A score that already holds
    the weights' variance or a rounding error counts it twice here, which is the signal's own
    affair; an exponent below 1 takes some of it back, and a negative one turns the ranking round.

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
        """What the signal needs."""
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
        values: log score, with mean 0 and standard deviation 1 within each projection, float64[U].
        constant: projections whose scores are all alike; their values are all 0.
    """

    values: Floats
    constant: tuple[str, ...]


def standardised(score: Floats, units: Units) -> Standardised:
    """Return log scores centred and scaled within each projection.

    Args:
        score: above 0, float64[U].
        units: say which projection each of them is.

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
    """Return values with mean 0 and deviation 1 within each group, and the groups without spread.

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


def positive(values: Floats) -> Floats:
    """Return scores from 0 as scores above 0: at least LEAST of their mean; all 1 if all are 0."""
    mean = float(np.mean(values))
    return np.maximum(values, LEAST * mean) if mean > 0 else np.ones_like(values)


def by_matrix(evidence: Evidence, statistic: Callable[[Tensor], Tensor]) -> Floats:
    """Return a statistic of each unit's weights, float64[U].

    Args:
        evidence: gives the units and their weights.
        statistic: from weights [n, rows, cols], float64, to numbers [n].
    """
    score = np.zeros(len(evidence.units))
    for run in stacks(evidence.units):
        weights = evidence.weights(run)
        chunks = weights.split(max(1, _CHUNK // weights[0].numel()))
        score[run] = torch.cat([statistic(chunk.double()) for chunk in chunks]).numpy()
    return score


def by_expert(
    evidence: Evidence, statistic: Callable[[LayerEvidence], Tensor], other: float = 1.0
) -> Floats:
    """Return a statistic of each unit's expert, float64[U].

    Args:
        evidence: with a calibration pass.
        statistic: from what a layer saw to numbers [E].
        other: the score of units that are no routed experts.

    Raises:
        InputError: the evidence is of weights alone.
    """
    score = np.full(len(evidence.units), other, dtype=np.float64)
    for run in stacks(evidence.units):
        if role_of(evidence.units, run) == "routed":
            layer, experts = seen(evidence, run)
            score[run] = statistic(layer)[experts].double().numpy()
    return score


def seen(evidence: Evidence, run: np.ndarray) -> tuple[LayerEvidence, Tensor]:
    """Return what the layer of a stack of routed units saw, and their experts, int64 [n].

    Raises:
        InputError: the evidence is of weights alone.
    """
    layer = int(evidence.units.layer[run[0]])
    if layer not in evidence.layers:
        raise InputError(f"layer {layer}: no calibration pass saw it; calibrate the model first")
    return experts_of(evidence, run)


def input_square(evidence: Evidence, run: np.ndarray) -> Tensor:
    """Return the mean square of each input of a stack's units a token, float64 [n, cols].

    Routed experts: Σ a² x² (down: Σ a² h²) over their tokens, per token of the text, shrunk.

    Raises:
        InputError: the evidence is of weights alone.
    """
    if role_of(evidence.units, run) != "routed":
        if any(int(unit) not in evidence.linears for unit in run):
            label = evidence.units.label(int(run[0]))
            raise InputError(f"{label}: no calibration pass saw it; calibrate the model first")
        found = [evidence.linears[int(unit)] for unit in run]
        return torch.stack([x.input_square / max(1, x.tokens) for x in found])
    layer, experts = seen(evidence, run)
    down = projection_of(evidence.units, run) == "down"
    return layer.shrunk(layer.middle_square if down else layer.input_square)[experts]


def curvature(evidence: Evidence, run: np.ndarray) -> Tensor:
    """Return the mean squared gradient of each weight of a stack, shrunk, float64 [n, rows, cols].

    Raises:
        InputError: it was not recorded, or a unit is not a routed expert's.
    """
    if role_of(evidence.units, run) != "routed":
        label = evidence.units.label(int(run[0]))
        raise InputError(f"{label}: gradients are those of routed experts only; include no others")
    layer, experts = seen(evidence, run)
    if not layer.curvature:
        raise InputError("gradients were not recorded; calibrate with curvature=True")
    return layer.shrunk(layer.curvature[projection_of(evidence.units, run)])[experts]


def rounding_error(weights: Tensor, format: Format) -> Tensor:
    """Return what storing `weights` [n, rows, cols] in a format adds to them, float64.

    Raises:
        InputError: the format is no grid, so it adds nothing.
    """
    if format.kind != "grid":
        raise InputError(f"format: {format} rounds nothing; give a grid, such as int3-g128-asym")
    return (round_trip(weights, plainest(format, weights.shape[2])) - weights).double()


def routed(units: Units) -> np.ndarray:
    """Return which units are routed experts', bool[U]."""
    found: np.ndarray = units.role == ROLES.index("routed")
    return found
