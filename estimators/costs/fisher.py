"""Rung A: half the diagonal empirical Fisher, with labels drawn from the model, × squared error.

With labels drawn from the model, the expected squared gradient is the curvature of the KL to the
unchanged model, so ½ Σ F Δ² is the second-order expansion of that KL (methods.md#ladder, A; HAWQ's
trace is a coarser form). Δ is the rounding error of each weight, or the change Δz of the experts'
output when one matrix is rounded (GEMQ, arXiv 2605.23078: Σ g² Δz²; the ½ and the division by
tokens convert it to nats, methods.md#conversions). Squares are taken per token, before summing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.errors import InputError
from bitknap.estimators.costs.weighed_errors import (
    Charge,
    experts_of,
    projection_of,
    role_of,
    stored_alike,
    weighed_table,
)
from bitknap.estimators.evidence.evidence import Evidence, shrink, zeros
from bitknap.estimators.measuring.float_range import narrowed, weighed_squares
from bitknap.estimators.sweep.expert_traces import Block, block_of
from bitknap.names import check_name

Space = Literal["weight", "output"]


@dataclass(frozen=True, slots=True)
class Fisher:
    """Diagonal empirical Fisher × squared error, of every weight or at the experts' output.

    In output space errors of different weights may cancel or add up within a token, and the
    activation function is run, not expanded; this needs one run of the expert per format.

    Attributes:
        space: "weight", Fisher of every weight × its squared rounding error; or "output",
            squared gradients at the experts' output × its squared change.
    """

    space: Space = "weight"

    def __post_init__(self) -> None:
        _check(self.space)

    @property
    def name(self) -> str:
        """The name on the command line: "fisher" or "fisher-output"."""
        return "fisher" if self.space == "weight" else "fisher-output"

    @property
    def needs(self) -> frozenset[str]:
        """Squared gradients; in output space traces with gradients."""
        return frozenset({"curvature"} if self.space == "weight" else {"traces", "gradients"})

    def estimate(self, evidence: Evidence, formats: Sequence[Format]) -> CostTable:
        """Return the costs of every unit in every format, nats per token.

        Raises:
            InputError: gradients were not recorded, or a unit is not a routed expert's.
        """
        blocks: dict[int, Block] = {}

        def weigh(run: np.ndarray, weights: Tensor) -> Charge:
            if self.space == "weight":
                grid = _half_fisher(evidence, run).to(weights.device)
                return lambda delta: weighed_squares(delta, grid).sum((1, 2))
            layer = _traced_layer(evidence, run)
            if layer not in blocks:
                blocks.clear()  # one layer's outputs at a time
                blocks[layer] = block_of(evidence, layer)
            block = blocks[layer]
            return lambda delta: _output_costs(block, evidence, run, weights + delta).sum(1)

        return weighed_table(evidence, formats, weigh, {"estimator": self.name})


def row_costs(
    evidence: Evidence, formats: Sequence[Format], run: np.ndarray, space: Space = "weight"
) -> Floats:
    """Return the cost of each output row of a stack; a unit's row costs sum to its cost.

    The error is additive over output rows for any diagonal curvature (methods.md#ladder).

    Args:
        evidence: must hold squared gradients; in output space traces and gradients.
        formats: the options; a kept precision costs nothing.
        run: equally shaped units of one layer's one projection, from `stacks`.
        space: as for `Fisher`. Output space is for down only, since the rows of gate and up have
            effects that cannot be separated in the output.

    Returns:
        float64 [n, rows, F], nats per token.

    Raises:
        InputError: gradients were not recorded, the units do not belong to routed experts, or the
            rows of this projection have no separate costs.
    """
    _check(space)
    if space == "output" and projection_of(evidence.units, run) != "down":
        raise InputError(
            f"row costs of {projection_of(evidence.units, run)}: in output space the effects of "
            "its rows cannot be separated; use space='weight'"
        )
    weights = evidence.weights(run)
    charge = _row_charge(evidence, run, weights, space)
    costs = np.zeros((*weights.shape[:2], len(formats)))
    for format, columns in stored_alike(formats, weights.shape[2]).items():
        costs[:, :, columns] = charge(evidence.round_trip(run, weights, format)).numpy()[:, :, None]
    return costs


def _row_charge(
    evidence: Evidence, run: np.ndarray, weights: Tensor, space: Space
) -> Callable[[Tensor], Tensor]:
    """Return the function from rounded weights to each row's cost, float64 [n, rows]."""
    if space == "output":
        block = block_of(evidence, _traced_layer(evidence, run))
        return lambda changed: _output_costs(block, evidence, run, changed)
    grid = _half_fisher(evidence, run).to(weights.device)
    return lambda changed: weighed_squares(changed - weights, grid).sum(2).double()


def _check(space: str) -> None:
    check_name("space", space, get_args(Space))


def _half_fisher(evidence: Evidence, run: np.ndarray) -> Tensor:
    """Return ½ of the mean squared gradient of each weight, [n, out, in] (`narrowed`)."""
    _check_routed(evidence, run)
    layer, experts = experts_of(evidence, run)
    if not layer.curvature:
        raise InputError("gradients were not recorded; calibrate with curvature=True")
    squares = layer.curvature[projection_of(evidence.units, run)]
    return 0.5 * narrowed(layer.shrunk(squares)[experts])


def _traced_layer(evidence: Evidence, run: np.ndarray) -> int:
    """Return the layer of a stack of routed units whose trace has gradients."""
    _check_routed(evidence, run)
    layer = int(evidence.units.layer[run[0]])
    trace = evidence.traces.get(layer)
    if trace is None or trace.gradient is None:
        raise InputError("gradients were not recorded; calibrate with gradients=True")
    return layer


def _check_routed(evidence: Evidence, run: np.ndarray) -> None:
    if role_of(evidence.units, run) != "routed":
        raise InputError("fisher: covers routed experts only; with `include`, use moments")


def _output_costs(block: Block, evidence: Evidence, run: np.ndarray, changed: Tensor) -> Tensor:
    """Return ½ Σ g² Δz² / T for each unit and output coordinate, shrunk, float64 [n, H].

    Args:
        block: the stack's layer.
        evidence: gives the units.
        run: the stack.
        changed: its new weights, float32 [n, out, in].
    """
    if block.trace.gradient is None:
        raise InputError("gradients were not recorded; calibrate with gradients=True")
    name = projection_of(evidence.units, run)
    _, experts = experts_of(evidence, run)
    whole = block.weights[name].clone()
    whole[experts] = changed
    square = block.trace.gradient.square()
    total = zeros(block.layer.experts, block.layer.hidden)
    for expert, token, change in block.changes({name: whole}):
        total[expert] = (square[token] * change.square()).double().sum(0)
    count = block.trace.count(block.layer.experts).cpu()
    return 0.5 * shrink(total, count, len(square))[experts]
