"""How routed experts compute: the call of a layer, and the function of each of its experts.

Most families use transformers' experts interface and differ only in class attributes. The others
have their own forward and an entry in the table here. All other experts classes are refused, since
measurements would be wrong.
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
    """The arguments of a call of a layer's experts.

    Attributes:
        hidden: one row per token, [T, H].
        experts: the experts of each row, int64 [T, k]; a number that no expert has means none.
        weights: factors of their outputs, [T, k].
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
        module: the module that the model calls once per layer.
        routed: reads the arguments of that call.
        weights: returns the weights of one expert as [out, in]: the first projections fused, and
            down.
        activate: maps the first projections' (or up's) outputs [n, 2I] to the middle [n, I].
        biases: returns one expert's biases, of the first projections and of down.
        finish: applied to an expert's output before its routing weight.
        copies: number of rows of every token in the call, one block of rows after the other; the
            caller sums their outputs.
        identity: whether expert numbers beyond the last expert return their input unchanged.
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
        """Return the call's output with `change` [T, H] added to the layer's contribution."""
        moved = output.reshape(self.copies, -1, output.shape[-1]).clone()
        moved[0] += change.to(output.dtype)
        return moved.view(output.shape)


def experts_at(model: Any, layer: ExpertLayer) -> Experts:
    """Return the routed experts of one layer of a live model.

    Raises:
        ModelError: the computation of their class is not known.
    """
    module = model.get_submodule(layer.module)
    kind = type(module).__name__
    if layer.decorated:
        return _interface(module, layer)
    if kind == "DbrxExpertGLU":  # holds the weights; its parent is called
        return _dbrx(model.get_submodule(layer.module.rpartition(".")[0]), layer)
    if kind in _KNOWN:
        return _KNOWN[kind](module, layer)
    why = _BROKEN.get(kind, "compute in a way that calibration does not know")
    raise ModelError(f"{layer.module}: experts of class {kind} {why}; use `estimator=DataFree()`")


def _interface(module: Any, layer: ExpertLayer) -> Experts:
    """Return experts that use transformers' interface, from the attributes of their class."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    return Experts(
        layer=layer,
        module=module,
        routed=_by_token,
        weights=_stacked(module, layer, first),
        biases=_rows(module, f"{first}_bias", "down_proj_bias") if module.has_bias else _none,
        activate=module._apply_gate if module.has_gate else module.act_fn,
        finish=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else _same,
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
    """Return experts that each get a copy of all tokens, scaled by the router or zero.

    The routing weight is part of their input, so the weight of their output is 1.
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
    """Return a function that reads one expert from 3-D tensors."""

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
