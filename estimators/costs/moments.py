"""Rung C: output error from second moments, times the layer's measured gain.

For the down projection the squared output error per token is tr(ΔW S ΔWᵀ) with S = Σ a² h hᵀ / T.
For gate and up an error dz_k moves the output by (dh_k/dz_k) dz_k W_down[:, k]; so row k is
weighted by its mean squared slope times ‖W_down[:, k]‖² (methods.md#ladder, GEMQ's expansion
carried one matrix further; slopes and inputs are assumed to be independent). The gain was measured
as KL over squared error, so the product is in nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.errors import InputError
from bitknap.estimators.costs.sampled_rows import (
    Picked,
    PickedCharge,
    RowCharge,
    part,
    sampled_table,
)
from bitknap.estimators.costs.weighed_errors import experts_of, projection_of, role_of
from bitknap.estimators.evidence.evidence import Evidence, LayerEvidence
from bitknap.estimators.measuring.float_range import fits, narrowed, weighed_squares


@dataclass(frozen=True, slots=True)
class SecondMoments:
    """Second moments of each projection's input × the layer's gain (ladder rung C).

    Errors are estimated from a sample of each unit's rows (`sampled_rows`), unless the evidence
    asks for a thorough table.

    Attributes:
        full: use whole matrices S, not only their diagonals, where the evidence has them.
    """

    full: bool = False
    name = "moments"

    @property
    def needs(self) -> frozenset[str]:
        """Moments; whole matrices if `full`."""
        return frozenset({"moments", "full"} if self.full else {"moments"})

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the costs of every unit in every format, nats per token.

        Raises:
            InputError: full moments were not recorded.
        """

        def weigh(run: np.ndarray, weights: Tensor) -> PickedCharge:
            if self.full and role_of(evidence.units, run) == "routed":
                return _full_charge(evidence, run, weights.device)
            return partial(_diagonal_charge, error_weights(evidence, run).to(weights.device))

        return sampled_table(evidence, formats, weigh, {"estimator": self.name})


def error_weights(evidence: Evidence, run: np.ndarray) -> Tensor:
    """Return the cost per unit of squared error of each weight, [n, 1 or out, in].

    The dtype is float32, or float64 where float32 cannot hold the values.

    Args:
        evidence: must hold moments.
        run: equally shaped units of one layer's one projection, from `stacks`.
    """
    if role_of(evidence.units, run) != "routed":
        return _linear_weights(evidence, run)
    layer, experts = experts_of(evidence, run)
    name = projection_of(evidence.units, run)
    rows = _row_weights(evidence, layer, run, name)[experts]
    moments = layer.middle_square if name == "down" else layer.input_square
    columns = layer.shrunk(moments)[experts]
    if name != "down":
        columns = columns / _gate_mass(layer)[experts, None]
    return narrowed(rows[:, :, None] * columns[:, None, :])


def _gate_mass(layer: LayerEvidence) -> Tensor:
    """Return Σ a² / T of each expert, shrunk and never zero, [E]."""
    return layer.shrunk(layer.gate_square).clamp_min(1e-30)


def _row_weights(evidence: Evidence, layer: LayerEvidence, run: np.ndarray, name: str) -> Tensor:
    """Return the cost per unit of squared error at each output of the projection, [E, out]."""
    if name == "down":
        return torch.full((len(layer.count), int(evidence.units.rows[run[0]])), layer.gain).double()
    down = _down_column_square(evidence, int(evidence.units.layer[run[0]]))
    return layer.shrunk(layer.slopes[name]) * down * layer.gain


def _down_column_square(evidence: Evidence, layer: int) -> Tensor:
    """Return ‖W_down[:, k]‖² of every expert of a layer, [E, I]."""
    units = evidence.units
    down = units.projections.index("down")
    routed = evidence.units.role == 0
    run = np.flatnonzero((units.layer == layer) & (units.projection == down) & routed)
    return evidence.weights(run).double().square().sum(1)


def _diagonal_charge(grid: Tensor, picked: Picked | None) -> RowCharge:
    """Return the charge of picked rows, given the cost per squared error of each weight."""
    here = part(grid, picked)
    return lambda delta: weighed_squares(delta, here).sum(2)


def _full_charge(evidence: Evidence, run: np.ndarray, device: torch.device) -> PickedCharge:
    layer, experts = experts_of(evidence, run)
    name = projection_of(evidence.units, run)
    rows = _row_weights(evidence, layer, run, name)[experts]
    whole = layer.middle_full if name == "down" else layer.input_full
    if whole is None:
        raise InputError("full second moments were not recorded; calibrate with full=True")
    s = layer.shrunk(whole)[experts]
    if name != "down":
        s = s / _gate_mass(layer)[experts, None, None]
    return partial(_whole_charge, narrowed(s).to(device), narrowed(rows).to(device))


def _whole_charge(moments: Tensor, rows: Tensor, picked: Picked | None) -> RowCharge:
    """Return the charge of picked rows, given whole second moments and the rows' weights."""
    each = moments if picked is None else moments[picked.matrices]
    weight = part(rows, picked)

    def charge(delta: Tensor) -> Tensor:
        narrow = each.dtype == weight.dtype == torch.float32 and fits(delta)
        kind = torch.float32 if narrow else torch.float64
        d, m, w = (x.to(kind) for x in (delta, each, weight))
        return (d @ m * d).sum(2) * w

    return charge


def _linear_weights(evidence: Evidence, run: np.ndarray) -> Tensor:
    """Return weights of an ordinary linear projection, as if the mean layer gain applied to it."""
    gains = [layer.gain for layer in evidence.layers.values()]
    gain = float(np.mean(gains)) if gains else 1.0
    statistics = [evidence.linears[int(unit)] for unit in run]
    columns = torch.stack([x.input_square / max(1, x.tokens) for x in statistics])
    return (narrowed(columns) * gain)[:, None, :]
