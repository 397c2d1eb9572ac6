"""Round every unit to its format in a plan, piece by piece, wherever the weights come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from bitknap.allocation.plans.plan import BitPlan
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.rounding.rounding import Coded, Inputs, Rounding
from bitknap.quantization.stacks.grouping import plan_pieces

# A function from units of one shape to the statistics of their inputs.
Watched = Callable[[np.ndarray], Inputs]


def quantize_plan(
    plan: BitPlan,
    read: Callable[[np.ndarray], Tensor],
    rounding: Rounding = RTN,
    inputs: Watched | None = None,
) -> Iterator[tuple[np.ndarray, Coded | Tensor]]:
    """Yield (units of one format, their stacked rows quantized) over the whole plan, in pieces.

    Units that keep their source precision are yielded as the weights that `read` returned.

    Args:
        plan: the format of every unit.
        read: function that returns the weights of units of one shape, float32 [n, rows, cols].
        rounding: how to round.
        inputs: statistics of units' inputs, for rounding methods that need them.
    """
    for which, format in plan_pieces(plan):
        weights = read(which)
        if format.kind == "keep":
            yield which, weights
        else:
            known = inputs(which) if inputs and rounding.needs_inputs else None
            yield which, rounding.quantize(weights, format, known)
