"""Statistics from which signals are made, one number per unit.

Every score is above 0: an expert without tokens is shrunk to its layer's mean
(`LayerEvidence.shrunk`), and a statistic that is 0, such as the variance of a zero matrix, is
raised to `LEAST` × the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import ROLES, Units
from bitknap.errors import InputError
from bitknap.estimators.costs.weighed_errors import experts_of, plainest, projection_of, role_of
from bitknap.estimators.evidence.evidence import Evidence, LayerEvidence
from bitknap.quantization.rounding.methods import round_trip
from bitknap.quantization.stacks.grouping import stacks

# A score of 0 becomes this share of the mean.
LEAST = 1e-6
# The usual 3-bit format of weight-only papers.
USUAL = Format(3, 128)
# Number of weights that a statistic processes at a time, in float64: 32 MiB.
_CHUNK = 1 << 22


def positive(values: Floats) -> Floats:
    """Return scores raised to at least LEAST × their mean, so above 0; all 1 if all are 0."""
    mean = float(np.mean(values))
    return np.maximum(values, LEAST * mean) if mean > 0 else np.ones_like(values)


def by_matrix(evidence: Evidence, statistic: Callable[[Tensor], Tensor]) -> Floats:
    """Return a statistic of each unit's weights, float64[U].

    Args:
        evidence: gives the units and their weights.
        statistic: maps weights [n, rows, cols], float64, to numbers [n].
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
        evidence: must hold a calibration pass.
        statistic: maps a layer's evidence to numbers [E].
        other: the score of units that are not routed experts.

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
    """Return the evidence of a routed stack's layer, and the units' experts, int64 [n].

    Raises:
        InputError: the evidence is of weights alone.
    """
    layer = int(evidence.units.layer[run[0]])
    if layer not in evidence.layers:
        raise InputError(f"layer {layer}: no calibration pass saw it; calibrate the model first")
    return experts_of(evidence, run)


def input_square(evidence: Evidence, run: np.ndarray) -> Tensor:
    """Return the mean square per token of each input of a stack's units, float64 [n, cols].

    Routed experts: Σ a² x² (down: Σ a² h²) over their tokens, per token of the text, shrunk.

    Raises:
        InputError: the evidence is of weights alone.
    """
    if role_of(evidence.units, run) != "routed":
        if any(int(unit) not in evidence.linears for unit in run):
            label = evidence.units.label(int(run[0]))
            raise InputError(f"{label}: no calibration pass saw it; calibrate the model first")
        statistics = [evidence.linears[int(unit)] for unit in run]
        return torch.stack([x.input_square / max(1, x.tokens) for x in statistics])
    layer, experts = seen(evidence, run)
    down = projection_of(evidence.units, run) == "down"
    return layer.shrunk(layer.middle_square if down else layer.input_square)[experts]


def curvature(evidence: Evidence, run: np.ndarray) -> Tensor:
    """Return the mean squared gradient of each weight of a stack, shrunk, float64 [n, rows, cols].

    Raises:
        InputError: gradients were not recorded, or a unit is not a routed expert's.
    """
    if role_of(evidence.units, run) != "routed":
        label = evidence.units.label(int(run[0]))
        raise InputError(
            f"{label}: gradients are recorded for routed experts only; leave out `include`"
        )
    layer, experts = seen(evidence, run)
    if not layer.curvature:
        raise InputError("gradients were not recorded; calibrate with curvature=True")
    return layer.shrunk(layer.curvature[projection_of(evidence.units, run)])[experts]


def rounding_error(weights: Tensor, format: Format) -> Tensor:
    """Return the rounding error of `weights` [n, rows, cols] in a format, float64.

    Raises:
        InputError: the format is not a grid, so it rounds nothing.
    """
    if format.kind != "grid":
        raise InputError(f"format: {format} rounds nothing; give a grid, such as int3-g128-asym")
    return (round_trip(weights, plainest(format, weights.shape[2])) - weights).double()


def routed(units: Units) -> np.ndarray:
    """Return which units belong to routed experts, bool[U]."""
    mask: np.ndarray = units.role == ROLES.index("routed")
    return mask


def by_stack(evidence: Evidence, statistic: Callable[[np.ndarray], Tensor]) -> Floats:
    """Return a statistic of each unit of each stack, raised above 0, float64[U].

    Args:
        evidence: gives the units.
        statistic: maps a stack's units to numbers [n].
    """
    score = np.zeros(len(evidence.units))
    for run in stacks(evidence.units):
        score[run] = statistic(run).double().numpy()
    return positive(score)
