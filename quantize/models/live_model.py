"""Find the experts of a live model by structure, not by class name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn

from bitknap.errors import ModelError
from bitknap.quantization.models.matrix_views import (
    Block,
    ExpertLayer,
    Found,
    Layout,
    View,
    arrange,
    cut,
    describe,
    matrix,
)
from bitknap.quantization.models.tensor_names import (
    STACKED_LEAVES,
    Stacks,
    check_stacks,
    find_linears,
    find_router,
    find_unknown,
    modules_blocks,
)

__all__ = ["ExpertLayer", "Layout", "View", "matrix", "walk"]


class _Storage(NamedTuple):
    """How an experts module stores its matrices."""

    transposed: bool = False
    interleaved: bool = False
    decorated: bool = False


# Classes with their own forward, which transformers' decorator does not describe.
_UNDECORATED: Mapping[str, _Storage] = {
    "Llama4TextExperts": _Storage(transposed=True),
    "LongcatFlashExperts": _Storage(),
    "Step3p7Experts": _Storage(),
}


def walk(model: nn.Module, include: Collection[str] = ()) -> Layout:
    """Return the units of `model`, where each of them lies, and its MoE layers.

    Routed experts are always units; routers, norms, embeddings, the head and the gate of a shared
    expert never are. Works on the meta device.

    Args:
        model: a transformers model, or one built like it.
        include: more roles, of "shared", "attention", "dense".

    Raises:
        InputError: a role cannot be included.
        ModelError: there are no units, or experts are stored in an unknown way.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    stacks = Stacks(shapes)
    linears = {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in shapes
    }
    matrices = list(find_linears(linears, stacks, include))
    blocks = modules_blocks(matrices, shapes)
    used = {row.view.tensor for row in matrices}
    for name, module in model.named_modules():
        used.update(_stacked(name, module, stacks, matrices, blocks))
    _check_known(model, shapes, stacks, used, include)
    for name in used:
        dtype = parameters[name].dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ModelError(f"{name}: {dtype} is already quantized; load the model in 16 bits")
    check_stacks(matrices, stacks)
    return arrange(matrices, describe(matrices, blocks, find_router(shapes, stacks, matrices)))


def _stacked(
    name: str, module: nn.Module, stacks: Stacks, found: list[Found], blocks: dict[int, Block]
) -> list[str]:
    """Add the experts that `module` itself stacks; return the parameters it used."""
    own = dict(module.named_parameters(recurse=False))
    dbrx = type(module).__name__ == "DbrxExpertGLU"
    leaves = ("w1", "v1", "w2") if dbrx else ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
    tensors = {leaf: own[leaf] for leaf in leaves if leaf in own and (dbrx or own[leaf].dim() == 3)}
    storage = _Storage() if dbrx else _storage(module)
    if storage is None or not {"down_proj", "w2"} & set(tensors) or len(tensors) < 2:
        return []
    place = stacks.split(f"{name}.down_proj")
    if place is None:
        return []
    layer, parts = place[1], int(module.moe_num_experts) if dbrx else None  # type: ignore[arg-type]
    # LongCat also stacks zero experts, which have no down projection.
    experts = parts or min(tensor.shape[0] for tensor in tensors.values())
    for leaf, tensor in tensors.items():
        transposed = storage.transposed or leaf == "w2"
        stack = View(tensor=f"{name}.{leaf}", parts=parts, transposed=transposed)
        projections = STACKED_LEAVES[leaf]
        found += cut(
            layer,
            stack,
            tuple(tensor.shape),
            projections,
            experts=experts,
            interleaved=storage.interleaved,
        )
    biased = any(leaf.endswith("_bias") for leaf in own)
    if layer in blocks:
        raise ModelError(f"layer {layer}: experts in both {blocks[layer].module} and {name}")
    blocks[layer] = Block(module=name, biased=biased, **storage._asdict())
    return [f"{name}.{leaf}" for leaf in tensors]


def _storage(module: nn.Module) -> _Storage | None:
    """Return how `module` stores experts, None if neither it nor the table says."""
    transposed = getattr(module, "is_transposed", None)
    concatenated = getattr(module, "is_concatenated", None)
    if isinstance(transposed, bool) and isinstance(concatenated, bool):
        return _Storage(transposed=transposed, interleaved=not concatenated, decorated=True)
    return _UNDECORATED.get(type(module).__name__)


def _check_known(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    stacks: Stacks,
    used: Collection[str],
    include: Collection[str],
) -> None:
    owners = {name: type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in shapes}
    unknown = find_unknown(shapes, stacks, used, include) or next(
        (
            name
            for name, owner in owners.items()
            if re.search("(?<!Shared)Experts", owner) and len(shapes[name]) > 2 and name not in used
        ),
        None,
    )
    if unknown is not None:
        raise ModelError(
            f"{unknown}: {owners[unknown]} stores experts of shape {list(shapes[unknown])} in a "
            "way that is not known; add it to STACKED_LEAVES in "
            "bitknap/quantization/models/tensor_names.py"
        )
