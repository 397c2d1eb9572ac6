"""Put a plan's units into the order in which a model has them, or refuse a foreign plan."""

from __future__ import annotations

import numpy as np

from bitknap.allocation.plans.plan import BitPlan
from bitknap.errors import MismatchError
from bitknap.quantization.models.matrix_views import Layout


def aligned(plan: BitPlan, layout: Layout) -> BitPlan:
    """Return the plan with its units in the layout's order.

    Raises:
        MismatchError: the plan has other units, or units of other shapes.
    """
    own, planned = layout.units, plan.units
    place = {planned.label(i): i for i in range(len(planned))}
    order = [place.get(own.label(i), -1) for i in range(len(own))]
    if len(own) != len(planned) or -1 in order:
        raise MismatchError(
            f"the plan's {len(planned)} units differ from the {len(own)} of the model; make a "
            "plan from a table of this model"
        )
    if not all(
        np.array_equal(getattr(own, n), getattr(planned, n)[order]) for n in ("rows", "cols")
    ):
        raise MismatchError(
            "the shapes of the plan's units differ from those of the model; make a plan from a "
            "table of this model"
        )
    return BitPlan.from_choice(
        own, plan.formats, plan.choice[order], model=plan.model, header=plan.header
    )
