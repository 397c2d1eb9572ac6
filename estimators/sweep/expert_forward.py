"""Routed experts as they compute: how a layer is called, and what each of its experts does.

Most families go through transformers' experts interface and differ in what a class says of
itself. The others have their own forward and a row in the table here. An experts class in neither
is refused: what is not understood is not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitknap.errors import ModelError
from bitknap.quantization.models.matrix_views import ExpertLayer


class Routed(NamedTuple):
    """What a layer's experts were called with.

    Attributes:
        hidden: one row a token, [T, H].
        experts: which each row goes to, int64 [T, k]; no expert's number where to none.
        weights: what their outputs are multiplied by, [T, k].
    """

    hidden: Tensor
    experts: Tensor
    weights: Tensor


def _same(x: Tensor) -> Tensor:
    return x


def _none(expert: int) -> tuple[None, None]:
    return None, None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experts:
    """The routed experts of one live layer.

    Attributes:
        layer: their sizes and layout.
        module: what the model calls once a layer.
        routed: reads the arguments of that call.
        weights: weights of one expert as [out, in], the first projections in one, and down.
        activate: from the first projections' outputs [n, 2I] (or up's) to the middle [n, I].
        biases: biases of one expert, of the first projections and of down.
        finish: what is done to an expert's output before its routing weight.
        copies: rows that the call has of every token, one block of rows after the other; the
            caller adds up what becomes of them.
        identity: whether numbers above the experts' pass their input on.
    """

    layer: ExpertLayer
    module: Any
    routed: Callable[..., Routed]
    weights: Callable[[int], tuple[Tensor, Tensor]]
    activate: Callable[[Tensor], Tensor]
    biases: Callable[[int], tuple[Tensor | None, Tensor | None]] = _none
    finish: Callable[[Tensor], Tensor] = _same
    copies: int = 1
    identity: bool = False

    def summed(self, rows: Tensor) -> Tensor:
        """Return what the layer adds to each token [T, H], from the call's output."""
        flat = rows.reshape(self.copies, -1, rows.shape[-1])
        return flat[0] if self.copies == 1 else flat.sum(0)

    def moved(self, output: Tensor, change: Tensor) -> Tensor:
        """Return the call's output after `change` [T, H] is added to what the layer adds."""
        moved = output.reshape(self.copies, -1, output.shape[-1]).clone()
        moved[0] += change.to(output.dtype)
        return moved.view(output.shape)


def experts_at(model: Any, layer: ExpertLayer) -> Experts:
    """Return the routed experts of one layer of a live model.

    Raises:
        ModelError: how their class computes is not known.
    """
    module = model.get_submodule(layer.module)
    kind = type(module).__name__
    if layer.decorated:
        return _interface(module, layer)
    if kind == "DbrxExpertGLU":  # holds the weights; its parent is what is called
        return _dbrx(model.get_submodule(layer.module.rpartition(".")[0]), layer)
    if kind in _KNOWN:
        return _KNOWN[kind](module, layer)
    why = _BROKEN.get(kind, "compute in a way that calibration does not know")
    raise ModelError(f"{layer.module}: experts of class {kind} {why}; use `estimator=DataFree()`")


def _interface(module: Any, layer: ExpertLayer) -> Experts:
    """Return experts that go through transformers' interface, by what the class declares."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    return Experts(
        layer=layer,
        module=module,
        routed=_by_token,
        weights=_stacked(module, layer, first),
        biases=_rows(module, f"{first}_bias", "down_proj_bias") if module.has_bias else _none,
        activate=module._apply_gate if module.has_gate else module.act_fn,
        finish=module.post_expert_norm if module.has_post_expert_norm else _same,
    )


def _longcat(module: Any, layer: ExpertLayer) -> Experts:
    return Experts(
        layer=layer,
        module=module,
        routed=_by_token,
        weights=_stacked(module, layer),
        activate=_gated(module.act_fn),
        identity=True,
    )


def _step(module: Any, layer: ExpertLayer) -> Experts:
    return Experts(
        layer=layer,
        module=module,
        routed=_by_token,
        weights=_stacked(module, layer),
        activate=module._apply_gate,
    )


def _llama4(module: Any, layer: ExpertLayer) -> Experts:
    """Return experts that get a copy of all tokens each, scaled by the router, else zero.

    The routing weight is part of their input, so on their output it is 1.
    """

    def routed(hidden: Tensor) -> Routed:
        rows = hidden.view(layer.experts, -1, layer.hidden)
        number = torch.arange(layer.experts, device=hidden.device)[:, None]
        index = torch.where(rows.detach().any(-1), number, -1)
        return Routed(hidden, index.view(-1, 1), torch.ones_like(hidden[:, :1]))

    return Experts(
        layer=layer,
        module=module,
        routed=routed,
        weights=_stacked(module, layer),
        activate=_gated(module.act_fn),
        copies=layer.experts,
    )


def _dbrx(module: Any, layer: ExpertLayer) -> Experts:
    glu = module.mlp
    shape = (layer.experts, layer.intermediate, layer.hidden)

    def weights(expert: int) -> tuple[Tensor, Tensor]:
        gate, up, down = (getattr(glu, name).view(shape)[expert] for name in ("w1", "v1", "w2"))
        return torch.cat((gate, up)), down.T

    return Experts(
        layer=layer,
        module=module,
        routed=_by_token,
        weights=weights,
        activate=_gated(glu.activation_fn),
    )


def _switch(module: Any, layer: ExpertLayer) -> Experts:
    """Return experts that are modules; a token beyond an expert's capacity goes to none."""

    def routed(hidden: Tensor, selected: Tensor, weights: Tensor) -> Routed:
        index = torch.where(selected.any(-1), selected.argmax(-1), -1)
        return Routed(hidden, index, weights)

    def of(expert: int) -> tuple[Tensor, Tensor]:
        own = module[f"expert_{expert}"]
        return own.wi.weight, own.wo.weight

    return Experts(
        layer=layer, module=module, routed=routed, weights=of, activate=module["expert_0"].act
    )


# Classes with their own forward.
_KNOWN: Mapping[str, Callable[[Any, ExpertLayer], Experts]] = {
    "Llama4TextExperts": _llama4,
    "LongcatFlashExperts": _longcat,
    "Step3p7Experts": _step,
    "SwitchTransformersExperts": _switch,
}

# NLLB's router gives a 0/1 mask where its experts read expert numbers (transformers 5.23).
_BROKEN = {"NllbMoeExperts": "get every token sent to experts 0 and 1 by transformers"}


def _by_token(hidden: Tensor, index: Tensor, weights: Tensor) -> Routed:
    return Routed(hidden.reshape(-1, hidden.shape[-1]), index, weights)


def _stacked(
    module: Any, layer: ExpertLayer, first: str = "gate_up_proj"
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return what reads one expert of 3-D tensors."""

    def weights(expert: int) -> tuple[Tensor, Tensor]:
        own = getattr(module, first)[expert], module.down_proj[expert]
        return (own[0].T, own[1].T) if layer.transposed else own

    return weights


def _rows(module: Any, first: str, down: str) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda expert: (getattr(module, first)[expert], getattr(module, down)[expert])


def _gated(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def activate(z: Tensor) -> Tensor:
        gate, up = z.chunk(2, dim=-1)
        return act(gate) * up

    return activate
