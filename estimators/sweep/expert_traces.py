"""Run one layer's experts again on recorded inputs, some of them with changed weights.

A change of one expert's weights moves the layer's output by Δz = Σ a Δo on the tokens routed to
it and nowhere else, so one sweep over a trace gives the change of every expert of a layer at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitknap.allocation.problem.units import ROLES, Units
from bitknap.errors import InputError
from bitknap.estimators.evidence.evidence import Evidence, LayerTrace
from bitknap.estimators.measuring.expert_forward import Experts
from bitknap.quantization.models.matrix_views import ExpertLayer


class Seen(NamedTuple):
    """One expert's computation on its n tokens, with unchanged weights.

    Attributes:
        token: the tokens, each once, int64 [n].
        share: their routing weights, summed if a token was routed here twice, float32 [n].
        middle: the input of down, float32 [n, I].
        output: the expert's output before the routing weight, float32 [n, H].
    """

    token: Tensor
    share: Tensor
    middle: Tensor
    output: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """The routed experts of one layer, ready to run again; 4 T k (H + I) bytes plus the weights.

    Attributes:
        layer: its sizes and layout.
        experts: the live experts, for their activation and biases.
        trace: the experts' inputs and routing.
        weights: by projection, float32 [E, out, in].
        seen: each expert's computation on its tokens.
    """

    layer: ExpertLayer
    experts: Experts
    trace: LayerTrace
    weights: Mapping[str, Tensor]
    seen: tuple[Seen, ...]

    def changes(self, changed: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the change of the block's output when one expert at a time is changed.

        Args:
            changed: by projection, the new weights of every expert, float32 [E, out, in].

        Yields:
            (expert, tokens int64 [n], Δz float32 [n, H]); experts without tokens are left out.
        """
        weights = {**self.weights, **changed}
        for expert, seen in enumerate(self.seen):
            if not len(seen.token):
                continue
            middle = seen.middle
            if set(changed) != {"down"}:
                x = self.trace.hidden[seen.token]
                middle = _middle(self.experts, weights, expert, x)
            output = _output(self.experts, weights, expert, middle)
            yield expert, seen.token, (output - seen.output) * seen.share[:, None]


def block_of(evidence: Evidence, layer: int) -> Block:
    """Return the experts of one layer with their trace, on the evidence's device.

    Raises:
        InputError: no trace of the layer was recorded, or the evidence has no model.
    """
    if layer not in evidence.traces:
        raise InputError(f"layer {layer}: no inputs were kept; calibrate with traces=True")
    if evidence.experts is None:
        raise InputError("running experts again needs the model that was calibrated")
    experts_layer = next(x for x in evidence.layout.layers if x.layer == layer)
    experts = evidence.experts(experts_layer)
    trace = evidence.traces[layer].to(evidence.device)
    weights = {
        name: evidence.weights(run).to(evidence.device)
        for name, run in runs(evidence.units, layer).items()
    }
    seen = []
    for expert in range(experts_layer.experts):
        routed = trace.index == expert
        token = routed.any(1).nonzero()[:, 0]
        share = (trace.weights * routed)[token].sum(1)
        middle = _middle(experts, weights, expert, trace.hidden[token])
        output = _output(experts, weights, expert, middle)
        seen.append(Seen(token, share, middle, output))
    return Block(
        layer=experts_layer, experts=experts, trace=trace, weights=weights, seen=tuple(seen)
    )


def runs(units: Units, layer: int) -> dict[str, np.ndarray]:
    """Return a layer's routed units by projection, ordered by expert, each int64 [E]."""
    there = (units.layer == layer) & (units.role == ROLES.index("routed"))
    by_projection = {}
    for projection in np.unique(units.projection[there]):
        run = np.flatnonzero(there & (units.projection == projection))
        by_projection[str(units.projections[projection])] = run[np.argsort(units.expert[run])]
    return by_projection


@torch.no_grad()
def _middle(experts: Experts, weights: Mapping[str, Tensor], expert: int, x: Tensor) -> Tensor:
    z = x @ weights["up"][expert].T
    if experts.layer.gated:
        gate = x @ weights["gate"][expert].T
        alternate = experts.layer.interleaved
        z = torch.stack((gate, z), -1).flatten(1) if alternate else torch.cat((gate, z), 1)
    bias, _ = experts.biases(expert)
    return experts.activate(z if bias is None else z + bias.float()).float()


@torch.no_grad()
def _output(experts: Experts, weights: Mapping[str, Tensor], expert: int, middle: Tensor) -> Tensor:
    output = middle @ weights["down"][expert].T
    _, bias = experts.biases(expert)
    return experts.finish(output if bias is None else output + bias.float()).float()
