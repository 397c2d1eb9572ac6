"""A model as a list of matrices: which part of which tensor each unit is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch

from bitknap.allocation.problem.units import ROLES, Units
from bitknap.errors import ModelError

# The order of projections within one expert; names that are not here follow, alphabetically.
PROJECTIONS = ("gate", "up", "down", "q", "k", "v", "o")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Where one [out, in] matrix lies inside a stored tensor.

    Attributes:
        tensor: name of the parameter, or of the tensor in a checkpoint.
        index: which expert of a tensor that stacks them; None if the tensor is one matrix.
        parts: how many experts a 2-D tensor holds one above the other; None where it is 3-D.
        start: first output row; None for row 0.
        stop: end of the output rows; None to the end.
        step: 2 where gate and up alternate, None otherwise.
        transposed: whether the matrix is stored as [in, out].
    """

    tensor: str
    index: int | None = None
    parts: int | None = None
    start: int | None = None
    stop: int | None = None
    step: int | None = None
    transposed: bool = False

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the [out, in] matrix as a view of `tensor`: `.copy_` into it writes back."""
        if self.parts is not None:
            tensor = tensor.view(self.parts, -1, tensor.shape[-1])
        matrix = tensor if self.index is None else tensor[self.index]
        if self.transposed:
            matrix = matrix.T
        return matrix[self.start : self.stop : self.step]

    def rows(self, first: int, last: int) -> View:
        """Return the view of output rows first .. last - 1 of this matrix."""
        start, step = self.start or 0, self.step or 1
        return replace(self, start=start + first * step, stop=start + last * step)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """The routed experts of one layer.

    Attributes:
        layer: global layer number; a decoder's layers come after its encoder's.
        module: qualified name of the experts, in the model or in the checkpoint.
        router: name of the router's weight, None if it has none.
        experts: how many routed experts.
        hidden: input and output size of an expert.
        intermediate: inner size of an expert.
        gated: whether there is a gate projection beside up.
        transposed: whether matrices are stored as [in, out].
        interleaved: whether gate and up alternate column by column.
        biased: whether the projections have biases.
        decorated: whether a live module has transformers' `@use_experts_implementation`.
        kind: "stacked" 3-D tensors, or one module an expert ("modules").
    """

    layer: int
    module: str
    router: str | None
    experts: int
    hidden: int
    intermediate: int
    gated: bool
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    decorated: bool = False
    kind: Literal["stacked", "modules"] = "stacked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All units of a model, where each of them lies, and the MoE layers.

    Attributes:
        units: sorted by layer, role, expert, projection.
        views: one per unit, in the same order.
        layers: one per MoE layer, in order.
    """

    units: Units
    views: tuple[View, ...]
    layers: tuple[ExpertLayer, ...]


def matrix(layout: Layout, i: int, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return unit `i` as an [out, in] view of the tensor that holds it."""
    view = layout.views[i]
    return view.of(tensors[view.tensor])


class Found(NamedTuple):
    """One matrix of a model: the key of its unit, its view and its (out, in)."""

    layer: int
    role: str
    expert: int
    projection: str
    view: View
    shape: tuple[int, int]


class Block(NamedTuple):
    """Properties of one layer's experts, beside their matrices."""

    module: str
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    decorated: bool = False
    kind: Literal["stacked", "modules"] = "stacked"


def cut(
    layer: int,
    stack: View,
    shape: tuple[int, ...],
    projections: tuple[str, ...],
    *,
    experts: int,
    interleaved: bool = False,
) -> Iterator[Found]:
    """Yield the routed matrices of one tensor that stacks the experts of a layer.

    Args:
        layer: global layer number.
        stack: names the tensor; says whether it is transposed and whether it is 2-D (`parts`).
        shape: shape of the tensor, [experts, ., .] or [experts * ., .].
        projections: the output rows of one expert, in equal shares.
        experts: how many of the stacked matrices compute something.
        interleaved: whether the shares alternate row by row.
    """
    rows, cols = shape[-2:]
    if stack.parts is not None:
        rows //= stack.parts
    if stack.transposed:
        rows, cols = cols, rows
    count = len(projections)
    size = rows // count
    for part, projection in enumerate(projections):
        share = replace(stack)
        if interleaved and count > 1:
            share = replace(stack, start=part, step=count)
        elif count > 1:
            share = replace(stack, start=part * size, stop=(part + 1) * size)
        for expert in range(experts):
            view = replace(share, index=expert)
            yield Found(layer, "routed", expert, projection, view, (size, cols))


def arrange(found: Iterable[Found], layers: Iterable[ExpertLayer]) -> Layout:
    """Sort a model's matrices into a layout.

    Raises:
        ModelError: there are no matrices, or two of them claim the same unit.
    """
    rows = sorted(found, key=_order)
    if not rows:
        raise ModelError(
            "the model has no routed experts; pass `include=('attention', 'dense')` to "
            "plan the rest"
        )
    for one, other in pairwise(rows):
        if one[:4] == other[:4]:
            raise ModelError(
                f"layer {one.layer} {one.role} {one.projection}: both {one.view.tensor} and "
                f"{other.view.tensor} claim this unit; pass the submodel that holds only one of "
                "them"
            )
    units = Units.build(
        layer=[row.layer for row in rows],
        role=[row.role for row in rows],
        expert=[row.expert for row in rows],
        projection=[row.projection for row in rows],
        rows=[row.shape[0] for row in rows],
        cols=[row.shape[1] for row in rows],
    )
    ordered = tuple(sorted(layers, key=lambda layer: layer.layer))
    return Layout(units=units, views=tuple(row.view for row in rows), layers=ordered)


def _order(row: Found) -> tuple[int, int, int, int, str]:
    name = row.projection
    rank = PROJECTIONS.index(name) if name in PROJECTIONS else len(PROJECTIONS)
    return row.layer, ROLES.index(row.role), row.expert, rank, name


def describe(
    found: Iterable[Found], blocks: Mapping[int, Block], routers: Mapping[int, str]
) -> Iterator[ExpertLayer]:
    """Yield the MoE layers that the routed matrices make up.

    Raises:
        ModelError: an expert lacks a projection that its neighbours have.
    """
    shapes: dict[int, dict[int, dict[str, tuple[int, int]]]] = {}
    for row in found:
        if row.role == "routed":
            experts = shapes.setdefault(row.layer, {})
            experts.setdefault(row.expert, {})[row.projection] = row.shape
    for layer, experts in shapes.items():
        block = blocks[layer]
        names = set().union(*experts.values()) | {"up", "down"}
        for expert in range(max(experts) + 1):
            missing = names - set(experts.get(expert, ()))
            if missing:
                raise ModelError(
                    f"layer {layer} expert {expert}: no {sorted(missing)[0]} projection in "
                    f"{block.module}, which has {max(experts) + 1} experts; is a tensor missing?"
                )
        hidden, intermediate = experts[0]["down"]
        yield ExpertLayer(
            layer=layer,
            router=routers.get(layer),
            experts=len(experts),
            hidden=hidden,
            intermediate=intermediate,
            gated="gate" in names,
            **block._asdict(),
        )
