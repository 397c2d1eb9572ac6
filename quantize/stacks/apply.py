"""Apply a plan to weights: quantize every unit in its format, whatever the weights' source."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bitknap.allocation.plans.plan import BitPlan
from bitknap.allocation.problem.format import Format
from bitknap.allocation.problem.units import Units
from bitknap.errors import MismatchError, ModelError
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.rounding.grid import Quantized
from bitknap.quantization.rounding.methods import RTN
from bitknap.quantization.rounding.rounding import Inputs, Rounding
from bitknap.quantization.source.source import Source

# Bytes of float32 weights processed at a time: many beside a call's cost, few beside a model.
PIECE = 1 << 25


def stacks(units: Units) -> list[np.ndarray]:
    """Return the units in runs that can be worked on together, each int64 [n].

    A stack holds the units of one layer, role, projection and shape: for routed experts, all
    experts of the layer.
    """
    keys = np.stack([units.layer, units.role, units.projection, units.rows, units.cols])
    _, stack_of = np.unique(keys, axis=1, return_inverse=True)
    order = np.argsort(stack_of, kind="stable")
    cuts = np.flatnonzero(np.diff(stack_of[order])) + 1
    runs = np.split(order, cuts)
    return sorted(runs, key=lambda run: int(run[0]))


def stack_pieces(units: Units, most: int = PIECE) -> list[np.ndarray]:
    """Return `stacks` cut into runs of at most `most` bytes of float32 weights, or of one unit."""
    return [which for run in stacks(units) for which in _in_pieces(run, units, most)]


def _in_pieces(run: np.ndarray, units: Units, most: int) -> list[np.ndarray]:
    size = 4 * int(units.rows[run[0]]) * int(units.cols[run[0]])
    count = max(1, most // max(1, size))
    return np.split(run, range(count, len(run), count))


def plan_pieces(plan: BitPlan) -> Iterator[tuple[np.ndarray, Format]]:
    """Yield runs of a plan's units and their format: `stack_pieces`, split by format."""
    for run in stacks(plan.units):
        choices = plan.choice[run]
        for choice in np.unique(choices):
            for which in _in_pieces(run[choices == choice], plan.units, PIECE):
                yield which, plan.formats[choice]


def read_units(layout: Layout, which: np.ndarray, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weights of equally shaped units, float32 [n, rows, cols].

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    weights = torch.stack([layout.views[i].of(tensors[layout.views[i].tensor]) for i in which])
    return _finite(layout, which, weights.float())


def read_stored(
    layout: Layout, which: np.ndarray, source: Source, rows: slice | None = None
) -> Tensor:
    """Return `read_units` of a source, reading one matrix at a time and little else.

    Args:
        layout: walked on the source's shapes.
        which: equally shaped units.
        source: a checkpoint, or anything else that reads matrices.
        rows: which output rows of each unit, by start and stop; all when not given.

    Raises:
        ModelError: a weight is NaN or infinite.
        FileError: a file has shrunk since it was opened.
    """
    units = layout.units
    part = slice(0, int(units.rows[which[0]])) if rows is None else rows
    weights = torch.empty(len(which), part.stop - part.start, int(units.cols[which[0]]))
    for place, unit in enumerate(which):
        view = layout.views[unit]
        weights[place] = source.read_matrix(
            view if rows is None else view.rows(part.start, part.stop)
        )
    return _finite(layout, which, weights)


def _finite(layout: Layout, which: np.ndarray, weights: Tensor) -> Tensor:
    if not all_finite(weights):
        bad = which[int((~torch.isfinite(weights)).flatten(1).any(1).nonzero()[0])]
        raise ModelError(
            f"{layout.views[bad].tensor}: NaN or infinite weight in "
            f"{layout.units.label(int(bad))}; "
            "repair the checkpoint before quantizing it"
        )
    return weights


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite, in one sweep and without a copy."""
    # `aminmax` returns NaN if any value is NaN.
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


# A function from units of one shape to the statistics of their inputs.
Watched = Callable[[np.ndarray], Inputs]


def quantize_plan(
    plan: BitPlan,
    read: Callable[[np.ndarray], Tensor],
    rounding: Rounding = RTN,
    inputs: Watched | None = None,
) -> Iterator[tuple[np.ndarray, Quantized | Tensor]]:
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
            f"the plan has {len(planned)} units and the model {len(own)}, or others; "
            "make a plan from a table of this model"
        )
    if not all(
        np.array_equal(getattr(own, n), getattr(planned, n)[order]) for n in ("rows", "cols")
    ):
        raise MismatchError(
            "the plan's units have other shapes than the model's; make a plan for it"
        )
    return BitPlan.from_choice(
        own, plan.formats, plan.choice[order], model=plan.model, header=plan.header
    )


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
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        targets = [layout.views[i].of(tensors[layout.views[i].tensor]) for i in which]
        before = [target.clone() for target in targets]
        after = change(torch.stack(before).float())
    try:
        _write(targets, after)
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
