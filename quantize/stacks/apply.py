"""Change a live model's weights in place: for good, or while a block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bitknap.allocation.plans.plan import BitPlan
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.rounding.rounding import Rounding
from bitknap.quantization.stacks.alignment import aligned
from bitknap.quantization.stacks.quantize_plan import Watched, quantize_plan
from bitknap.quantization.stacks.reading import read_units


@torch.no_grad()
def apply(
    model: nn.Module,
    layout: Layout,
    plan: BitPlan,
    rounding: Rounding = RTN,
    inputs: Watched | None = None,
) -> None:
    """Replace the model's weights by their values under the plan, in place.

    Args:
        model: the model that `layout` was walked on.
        layout: its units and their views.
        plan: a plan over the same units.
        rounding: how to round.
        inputs: statistics of units' inputs, for rounding methods that need them.
    """
    plan = aligned(plan, layout)
    tensors = dict(model.named_parameters())

    def read(which: np.ndarray) -> Tensor:
        return read_units(layout, which, tensors)

    for which, quantized in quantize_plan(plan, read, rounding, inputs):
        if isinstance(quantized, Tensor):
            continue
        rows = int(plan.units.rows[which[0]])
        for unit, weight in zip(which, quantized.dequantize().split(rows), strict=True):
            view = layout.views[unit]
            view.of(tensors[view.tensor]).copy_(weight)


@contextlib.contextmanager
def replaced(
    model: nn.Module, layout: Layout, which: Iterable[int], change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Change the weights of some units while the block runs; then put them back.

    Args:
        model: the model that `layout` was walked on.
        layout: its units and their views.
        which: equally shaped units.
        change: function from their weights, float32 [n, rows, cols], to the new ones.
    """
    with torch.no_grad():
        # Named one by one: a list of all parameters takes longer than a small matrix.
        views = [layout.views[i] for i in which]
        targets = [view.of(model.get_parameter(view.tensor)) for view in views]
        before = [target.clone() for target in targets]
    try:
        _write(targets, change(torch.stack(before).float()))
        yield
    finally:
        _write(targets, before)


@contextlib.contextmanager
def applied(
    model: nn.Module,
    layout: Layout,
    plan: BitPlan,
    rounding: Rounding = RTN,
    inputs: Watched | None = None,
) -> Iterator[None]:
    """`apply` a plan while the block runs; then put the weights back."""
    names = {view.tensor for view in layout.views}
    tensors = [p for name, p in model.named_parameters() if name in names]
    before = [p.detach().clone() for p in tensors]
    try:
        apply(model, layout, plan, rounding, inputs)
        yield
    finally:
        _write(tensors, before)


@torch.no_grad()
def _write(targets: Sequence[Tensor], values: Iterable[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
