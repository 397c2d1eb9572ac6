"""Super experts: the few experts that the model cannot do without, however rarely they are used.

Only the size of their output reveals them: in Mixtral, expert 3 of layer 1 moves its layer's
output 122 times as far as the median expert does, with an ordinary share of tokens
(methods.md#mc-moe).
"""

from __future__ import annotations

import numpy as np

from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.table import CostTable, widths
from bitknap.allocation.problem.units import ROLES
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence

# An expert counts as super from this multiple of the layer's median (methods.md#pitfalls, pitfall
# 9).
TIMES_MEDIAN = 10.0


def super_experts(
    source: Evidence | CostTable, times: float = TIMES_MEDIAN
) -> list[tuple[int, int, float]]:
    """Return (layer, expert, ratio) of experts far above their layer's median, in order.

    Args:
        source: evidence, whose largest outputs are compared; or a table, whose output errors in its
            narrowest format are compared. Costs in nats grow with the square of an error, so the
            root of their ratio is used; a table whose unit is "score" holds norms.
        times: ratio above which an expert is listed.

    Raises:
        InputError: largest outputs were not recorded in the evidence.
    """
    sizes = _outputs(source) if isinstance(source, Evidence) else _errors(source)
    listed = []
    for layer, size in sorted(sizes.items()):
        positive = size[size > 0]
        if len(positive):
            ratio = size / np.median(positive)
            listed += [(layer, int(e), float(ratio[e])) for e in np.flatnonzero(ratio > times)]
    return listed


def _outputs(evidence: Evidence) -> dict[int, Floats]:
    """Return the largest output of each expert of each layer; 0 without tokens."""
    largest: dict[int, Floats] = {}
    for number, layer in evidence.layers.items():
        if layer.output_max is None:
            raise InputError(
                f"layer {number}: the largest expert outputs were not recorded; calibrate again"
            )
        largest[number] = layer.output_max.numpy()
    return largest


def _errors(table: CostTable) -> dict[int, Floats]:
    """Return the output error of each expert of each layer, in the narrowest format."""
    units = table.units
    grids = [column for column, item in enumerate(table.formats) if item.kind == "grid"]
    if not grids:
        return {}
    column = grids[int(np.argmin(widths([table.formats[i] for i in grids])))]
    routed = np.flatnonzero((units.role == ROLES.index("routed")) & (units.expert >= 0))
    known = np.where(np.isfinite(table.cost[:, column]), table.cost[:, column], 0.0)
    power = 1.0 if table.provenance.get("unit") == "score" else 0.5
    errors: dict[int, Floats] = {}
    for layer in np.unique(units.layer[routed]):
        run = routed[units.layer[routed] == layer]
        total = np.bincount(units.expert[run], np.maximum(known[run], 0))
        errors[int(layer)] = np.asarray(total**power, dtype=np.float64)
    return errors
