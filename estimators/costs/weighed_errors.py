"""Weighted rounding errors: the shared loop of all estimators that charge a real round trip.

A cost is the sum of weight × ΔW² over a matrix. ΔW is the rounding error of the quantizer that is
deployed; the weight is the loss per unit of squared error, in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.codecs.ggml import stored_as
from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.allocation.problem.units import ROLES, Units
from bitknap.estimators.evidence.evidence import Evidence, LayerEvidence
from bitknap.quantization.stacks.grouping import stack_pieces, stacks

# Bytes of float32 weights rounded at a time; a charge may read a whole stack for each piece.
_PIECE = 1 << 28

# Maps rounding errors ΔW [n, out, in] to costs in nats per token [n].
Charge = Callable[[Tensor], Tensor]
# Maps a stack of units and their weights to their charge, on the weights' device.
Weigh = Callable[[np.ndarray, Tensor], Charge]


def weighed_table(
    evidence: Evidence,
    formats: Sequence[Format],
    weigh: Weigh,
    provenance: Mapping[str, Any],
) -> CostTable:
    """Round every unit to every format and charge the errors.

    Args:
        evidence: gives the units and their weights.
        formats: the options; a kept precision costs nothing.
        weigh: returns the charge of a stack of equally shaped units.
        provenance: the table's provenance, in addition to the evidence's.
    """
    units = evidence.units
    cost = np.zeros((len(units), len(formats)))
    # With traces a layer's weights are in memory anyway, and each charge runs all its experts.
    runs = stacks(units) if evidence.traces else stack_pieces(units, _PIECE)
    for run in runs:
        weights = evidence.weights(run).to(evidence.device)
        charge = weigh(run, weights)
        for grid, columns in stored_alike(formats, weights.shape[2]).items():
            error = evidence.round_trip(run, weights, grid) - weights
            cost[run[:, None], columns] = charge(error).double().cpu().numpy()[:, None]
    return table_of(evidence, formats, cost, provenance)


def table_of(
    evidence: Evidence, formats: Sequence[Format], cost: Floats, provenance: Mapping[str, Any]
) -> CostTable:
    """Return the table of costs that were charged for rounding errors, float64 [U, F].

    Args:
        evidence: gives the units, the rounding and the share of tokens that use each.
        formats: the columns.
        cost: nats per token.
        provenance: the table's provenance, in addition to the evidence's.
    """
    return CostTable.from_arrays(
        cost,
        format_bytes(evidence.units, formats),
        units=evidence.units,
        formats=tuple(formats),
        frequency=token_share(evidence),
        provenance={
            **evidence.provenance,
            "method": evidence.rounding.name,
            "unit": "nats/token",
            **provenance,
        },
    )


def token_share(evidence: Evidence) -> np.ndarray:
    """Return the share of tokens that use each unit's weights, float64 [U]; 1 if not routed."""
    units = evidence.units
    share = np.ones(len(units))
    for number, layer in evidence.layers.items():
        run = np.flatnonzero((units.layer == number) & (units.role == ROLES.index("routed")))
        # A token that is routed to an expert twice uses its weights once.
        seen = np.minimum(layer.count.numpy() / max(1, layer.tokens), 1)
        share[run] = seen[units.expert[run]]
    return share


def plainest(format: Format, cols: int) -> Format:
    """Return the simplest format that stores rows of `cols` weights in the same way."""
    if format.kind == "ggml":
        return Format.ggml(stored_as(format.source, cols))
    size = 0 if format.group_size >= cols else format.group_size
    one_scale = format.compact and format.symmetric and size == 0
    return replace(format, group_size=size, metadata="fp16" if one_scale else format.metadata)


def stored_alike(formats: Sequence[Format], cols: int) -> dict[Format, list[int]]:
    """Return the columns of the formats that store rows of `cols` weights alike, by `plainest`.

    Each grid is rounded once for all its columns. Kept precisions round nothing and are left out.
    """
    alike: dict[Format, list[int]] = {}
    for column, format in enumerate(formats):
        if format.kind != "keep":
            alike.setdefault(plainest(format, cols), []).append(column)
    return alike


def format_bytes(units: Units, formats: Sequence[Format]) -> np.ndarray:
    """Return the exact bytes of every unit in every format, int64 [U, F]."""
    return np.stack([f.nbytes(units.rows, units.cols) for f in formats], axis=1)


def role_of(units: Units, run: np.ndarray) -> str:
    """Return the role that a stack's units share."""
    return ROLES[units.role[run[0]]]


def experts_of(evidence: Evidence, run: np.ndarray) -> tuple[LayerEvidence, Tensor]:
    """Return the evidence of a routed stack's layer, and the units' experts, int64 [n]."""
    layer = evidence.layers[int(evidence.units.layer[run[0]])]
    return layer, torch.from_numpy(evidence.units.expert[run].astype(np.int64))


def projection_of(units: Units, run: np.ndarray) -> str:
    """Return the projection that a stack's units share."""
    return str(units.projections[units.projection[run[0]]])
