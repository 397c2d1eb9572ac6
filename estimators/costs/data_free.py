"""Rung E: variance of the weights × the grid's distortion; no data and no rounding at all.

The distortion is a grid's mean squared error on Gaussian weights of variance 1
(methods.md#distortion), obtained once per format by running the quantizer on such weights with a
fixed seed. The costs only rank units; measured group gains convert them to nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.estimators.costs.weighed_errors import format_bytes
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.quantization.rounding.methods import round_trip
from bitknap.quantization.stacks.grouping import stack_pieces

_SAMPLE = 1 << 16  # weights; enough to know the distortion to about 1 %


@dataclass(frozen=True, slots=True)
class DataFree:
    """Weights × variance × the format's distortion of Gaussian weights (ladder rung E).

    Only ranks: the table's unit is "squared error" until it is calibrated.
    """

    name = "data-free"
    needs: frozenset[str] = frozenset()

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return relative costs of every unit in every format."""
        units = evidence.units
        cost = np.zeros((len(units), len(formats)))
        known: dict[int, np.ndarray] = {}
        for run in stack_pieces(units):
            size = evidence.weights(run).double().var((1, 2)).numpy() * units.numel[run]
            cols = int(units.cols[run[0]])
            if cols not in known:
                known[cols] = np.array([distortion(f, cols) for f in formats])
            cost[run] = size[:, None] * known[cols]
        return CostTable.from_arrays(
            cost,
            format_bytes(units, formats),
            units=units,
            formats=tuple(formats),
            provenance={
                **evidence.provenance,
                "method": "rtn",
                "unit": "squared error",
                "estimator": self.name,
            },
        )


def distortion(format: Format, cols: int) -> float:
    """Return E(Δw²) of `format` on Gaussian rows of `cols` weights with variance 1."""
    if format.kind == "keep":
        return 0.0
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, max(1, _SAMPLE // cols), cols, generator=generator)
    return float((round_trip(sample, format) - sample).square().mean())
