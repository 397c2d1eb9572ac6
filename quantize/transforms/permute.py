"""Reorder the neurons of experts, so that rows of similar sensitivity share a block.

Neuron i of an expert is row i of gate and of up, their biases, and column i of down. What the
expert computes is a sum over its neurons,

    y = Σ_i down[:, i] · act(gate[i] · x) (up[i] · x),

so any order computes the same. That is why no permutation is stored anywhere: once the weights are
in the new order, they are simply another checkpoint of the same model.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bitknap.allocation.problem.arrays import Longs
from bitknap.allocation.problem.units import ROLES
from bitknap.errors import InputError, MismatchError, ModelError
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.models.matrix_views import Layout, View
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.source_config import unquantized
from bitknap.quantization.transforms.rewritten_checkpoint import Rewritten


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Permutation:
    """A new order of the neurons of every expert.

    Attributes:
        order: by layer number, which neuron comes to each place, int64 [experts, intermediate].
    """

    order: Mapping[int, Longs]

    def __post_init__(self) -> None:
        orders = {}
        for layer, order in self.order.items():
            kept = np.array(order, dtype=np.int64)
            places = np.arange(kept.shape[-1])
            if kept.ndim != 2 or not (np.sort(kept, axis=1) == places).all():
                raise InputError(
                    f"order: layer {layer}: not a permutation of the {kept.shape[-1]} neurons of "
                    "each expert"
                )
            kept.setflags(write=False)
            orders[layer] = kept
        object.__setattr__(self, "order", MappingProxyType(orders))

    @property
    def digest(self) -> str:
        """32 hex digits that tell this order from others."""
        hasher = hashlib.sha256()
        for layer, order in sorted(self.order.items()):
            hasher.update(f"{layer} {order.shape}".encode() + order.astype("<i8").tobytes())
        return hasher.digest()[:16].hex()


def order_neurons(layout: Layout, scores: Mapping[int, npt.ArrayLike]) -> Permutation:
    """Return the order by decreasing score; neurons with equal scores keep their order.

    Args:
        layout: says which layers there are.
        scores: by layer number, the score of each neuron, [experts, intermediate]; see
            `estimators.published.xie.neuron_scores`.

    Raises:
        InputError: a layer has no scores, or scores of another shape, or a NaN.
    """
    order = {}
    for layer in layout.layers:
        wanted = (layer.experts, layer.intermediate)
        score = np.asarray(scores.get(layer.layer, np.empty(0)), dtype=np.float64)
        if score.shape != wanted or np.isnan(score).any():
            raise InputError(
                f"scores: layer {layer.layer}: expected numbers of shape {list(wanted)}, got "
                f"{list(score.shape)}{' with NaN' if score.shape == wanted else ''}"
            )
        order[layer.layer] = np.argsort(-score, axis=1, kind="stable")
    return Permutation(order=order)


@torch.no_grad()
def permute(model: nn.Module, layout: Layout, permutation: Permutation) -> None:
    """Reorder the neurons of a live model in place; its outputs do not change.

    Args:
        model: the model that `layout` was walked on.
        layout: its units and their views, of whole matrices.
        permutation: the order.

    Raises:
        InputError: the layout is cut into blocks.
        MismatchError: the permutation is for another model.
        ModelError: experts have parameters that are not known to follow their neurons.
    """
    tensors = dict(model.named_parameters())
    for name, parts in _parts(layout, permutation, tensors).items():
        _reorder(tensors[name], parts)


def permuted(source: Checkpoint, permutation: Permutation) -> Rewritten:
    """Return a checkpoint whose neurons are reordered as it is read.

    `rewritten_checkpoint.write` writes it as a plain checkpoint, which all other code can read.

    Args:
        source: the checkpoint.
        permutation: the order, of this model; it may come from the live model's layout.

    Raises:
        MismatchError: the permutation is for another model.
        ModelError: experts have tensors that are not known to follow their neurons, or the weights
            are quantized.
    """
    config = unquantized(source.config)
    parts = _parts(walk_headers(source.config, source.shapes), permutation, source.headers)

    def change(name: str, tensor: Tensor) -> Tensor:
        if name in parts:
            _reorder(tensor, parts[name])
        return tensor

    mark = f"neurons {permutation.digest}"
    return Rewritten(source=source, change=change, mark=mark, config=config)


class _Part(NamedTuple):
    """The part of a tensor that follows the neurons of one expert, and their order."""

    view: View
    axis: int  # 0: rows, 1: columns
    order: Tensor
    is_bias: bool


def _parts(
    layout: Layout, permutation: Permutation, names: Collection[str]
) -> dict[str, list[_Part]]:
    """Return the reordered parts of each tensor, by its name."""
    units = layout.units
    if units.block.any():
        raise InputError(
            "layout: its matrices are already cut into blocks; permute with the layout of whole "
            "matrices"
        )
    _check_shapes(layout, permutation)
    routed = units.role == ROLES.index("routed")
    orders = {n: torch.from_numpy(order.copy()) for n, order in permutation.order.items()}
    parts: defaultdict[str, list[_Part]] = defaultdict(list)
    known: set[str] = set()
    for unit in np.flatnonzero(routed).tolist():
        view = layout.views[unit]
        order = orders[int(units.layer[unit])][int(units.expert[unit])]
        bias = _bias_of(view, names)
        known.update((view.tensor, bias))
        is_down = units.projections[units.projection[unit]] == "down"
        parts[view.tensor].append(_Part(view, int(is_down), order, False))
        if bias and not is_down:
            parts[bias].append(_Part(view, 0, order, True))
    inside = tuple(f"{layer.module}." for layer in layout.layers)
    # Granite's router lies among its experts on disk; it chooses experts, not neurons.
    routers = tuple(f"{at.router.rpartition('.')[0]}." for at in layout.layers if at.router)
    others = (n for n in names if n.startswith(inside) and not n.startswith(routers))
    unknown = next((n for n in others if n not in known), None)
    if unknown:
        raise ModelError(
            f"{unknown}: it is not known whether it depends on the order of an expert's neurons, "
            "so this model's neurons cannot be sorted"
        )
    return parts


def _check_shapes(layout: Layout, permutation: Permutation) -> None:
    wanted = {layer.layer: (layer.experts, layer.intermediate) for layer in layout.layers}
    given = {layer: order.shape for layer, order in permutation.order.items()}
    if wanted != given:
        layer = next(n for n in sorted({*wanted, *given}) if wanted.get(n) != given.get(n))
        raise MismatchError(
            f"layer {layer}: the permutation has {given.get(layer)} experts and neurons, the "
            f"model {wanted.get(layer)}; make one from this model's scores"
        )


def _bias_of(view: View, names: Collection[str]) -> str:
    """Return the name of the bias beside a matrix, "" if there is none."""
    base = view.tensor.removesuffix(".weight")
    return next((name for name in (f"{base}_bias", f"{base}.bias") if name in names), "")


def _reorder(tensor: Tensor, parts: list[_Part]) -> None:
    for view, axis, order, is_bias in parts:
        if is_bias:
            one = tensor if view.index is None else tensor[view.index]
            target = one[view.start : view.stop : view.step]
        else:
            target = view.of(tensor)
        target.copy_(target.index_select(axis, order.to(target.device)))
