"""Super experts: a few that the model cannot do without, whatever their frequency says.

Only their output shows them: in Mixtral, expert 3 of layer 1 moves its layer's output 122 times
as far as the median expert, at an ordinary share of tokens (methods.md#mc-moe).
"""

from __future__ import annotations

import numpy as np

from bitknap.allocation.problem.arrays import Floats
from bitknap.allocation.problem.table import CostTable, widths
from bitknap.allocation.problem.units import ROLES
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence

# Times the layer's median from which an expert counts as one (methods.md#pitfalls, pitfall 9).
TIMES_MEDIAN = 10.0


def super_experts(
    source: Evidence | CostTable, times: float = TIMES_MEDIAN
) -> list[tuple[int, int, float]]:
    """Return (layer, expert, ratio) of experts far above their layer's median, in order.

    Args:
        source: evidence, whose largest outputs are compared; or a table, whose output errors in
            its narrowest format are. Costs in nats grow with the square of an error, so that
            there the root of the ratio counts; a table whose unit is "score" holds norms.
        times: ratio above which an expert is listed.

    Raises:
        InputError: the evidence has no largest outputs.
    """
    sizes = _outputs(source) if isinstance(source, Evidence) else _errors(source)
    found = []
    for layer, size in sorted(sizes.items()):
        positive = size[size > 0]
        if len(positive):
            ratio = size / np.median(positive)
            found += [(layer, int(e), float(ratio[e])) for e in np.flatnonzero(ratio > times)]
    return found


def _outputs(evidence: Evidence) -> dict[int, Floats]:
    """Return the largest output of each expert of each layer; 0 without tokens."""
    found: dict[int, Floats] = {}
    for number, layer in evidence.layers.items():
        if layer.output_max is None:
            raise InputError(f"layer {number}: no largest outputs recorded; calibrate it again")
        found[number] = layer.output_max.numpy()
    return found


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
    found: dict[int, Floats] = {}
    for layer in np.unique(units.layer[routed]):
        run = routed[units.layer[routed] == layer]
        total = np.bincount(units.expert[run], np.maximum(known[run], 0))
        found[int(layer)] = np.asarray(total**power, dtype=np.float64)
    return found
