"""Row blocks: divides any estimator's matrix costs among runs of output rows.

Errors of different rows add up for any diagonal curvature (methods.md#ladder), so a matrix's cost
in a format is the sum of its blocks'. The shares of the blocks come from the second moments, as
`SecondMoments` charges rows, or from plain squared errors if no text was read. Totals stay the
estimator's, including measured gains.

Blocks pay where rows differ more between blocks than within them. Sorting neurons does that for
gate and up (`order`), whose rows are neurons; rows of down are outputs, whose order is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.table import CostTable
from bitknap.errors import InputError
from bitknap.estimators.costs.moments import error_weights
from bitknap.estimators.costs.weighed_errors import format_bytes, projection_of, stored_alike
from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.measuring.float_range import weighed_squares
from bitknap.estimators.signals.unit_statistics import routed
from bitknap.quantization.stacks.grouping import stack_pieces
from bitknap.quantization.stacks.row_blocks import block_units
from bitknap.quantization.transforms.transformed_model import Sorting

# Neurons are ordered by their cost in this format, at which blocks differ.
_ORDERED_AT = Format.parse("int2-g64-asym")
# More blocks than is practical; block numbers still fit in a byte.
MOST = 256


def check(blocks: int, *, permute: bool = False) -> None:
    """Refuse meaningless numbers of blocks.

    Raises:
        InputError: `blocks` is not from 1 to 256, or neurons are to be sorted into one block.
    """
    if not 1 <= blocks <= MOST:
        raise InputError(f"row blocks: {blocks} is not from 1 to {MOST}; 4 is usual")
    if permute and blocks == 1:
        raise InputError("permute: sorts neurons for row blocks; ask for at least 2 row blocks")


def by_rows(table: CostTable, evidence: Evidence, blocks: int) -> CostTable:
    """Return the table over blocks of rows; each matrix's total costs do not change.

    Args:
        table: table of whole matrices, in the order of the evidence.
        evidence: weights, and moments if a text was read.
        blocks: number of blocks per matrix, equal to within one row; a matrix with fewer rows gets
            one block per row.

    Raises:
        InputError: blocks is below 1, or the units are cut already.
    """
    units, source = block_units(table.units, blocks)
    first = np.concatenate([[0], np.cumsum(np.bincount(source))])
    share = np.zeros((len(units), len(table.formats)))
    for run, columns, rows in _row_costs(evidence, table.formats):
        count = int(first[run[0] + 1] - first[run[0]])
        sizes = units.rows[first[run[0]] : first[run[0] + 1]]
        cuts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        parts = np.add.reduceat(rows, cuts, axis=1)
        total = parts.sum(axis=1, keepdims=True)
        even = np.broadcast_to(sizes / sizes.sum(), parts.shape)
        shares = np.divide(parts, total, out=even.copy(), where=total > 0)
        members = first[run][:, None] + np.arange(count)
        share[members[:, :, None], columns] = shares[:, :, None]
    keep = np.array([item.kind == "keep" for item in table.formats])
    # Costs of a kept precision are 0 or forbidden; neither is divided.
    share[:, keep] = 1.0
    cost = np.where(np.isinf(table.cost[source]), np.inf, table.cost[source] * share)
    return CostTable.from_arrays(
        cost,
        format_bytes(units, table.formats),
        units=units,
        formats=table.formats,
        spread=None if table.spread is None else table.spread[source] * share,
        frequency=None if table.frequency is None else table.frequency[source],
        provenance={**table.provenance, "row_blocks": blocks},
    )


def sorting(evidence: Evidence, blocks: int) -> Sorting:
    """Return the blocks of neurons, in descending cost of their rows of gate and up.

    Raises:
        InputError: blocks is not from 2 to 256.
    """
    check(blocks, permute=True)
    layers = evidence.layout.layers
    scores = {at.layer: np.zeros((at.experts, at.intermediate)) for at in layers}
    units = evidence.units
    for run, _, rows in _row_costs(evidence, [_ORDERED_AT]):
        if routed(units)[run[0]] and projection_of(units, run) != "down":
            scores[int(units.layer[run[0]])][units.expert[run]] += rows
    return Sorting.by_score(scores, blocks)


def _row_costs(
    evidence: Evidence, formats: Sequence[Format]
) -> Iterator[tuple[np.ndarray, list[int], Floats]]:
    """Yield equally shaped units, the columns of one grid, and each row's cost [n, rows]."""
    for run in stack_pieces(evidence.units):
        weights = evidence.weights(run)
        known = bool(evidence.layers or evidence.linears)
        grid = error_weights(evidence, run) if known else torch.ones(())
        for format, alike in stored_alike(formats, weights.shape[2]).items():
            error = evidence.round_trip(run, weights, format) - weights
            yield run, alike, weighed_squares(error, grid).sum(2).double().numpy()
