"""For tests of estimators: tiny models, and what calibration records on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitknap.estimators.evidence.evidence import Evidence
from bitknap.estimators.measuring.noise_floor import KEY
from bitknap.estimators.sweep.in_memory import PLAIN, calibrate
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.quantization.models.live_model import walk
from bitknap.quantization.models.matrix_views import Layout
from bitknap.quantization.stacks.reading import read_units
from bitknap.testing.models import SIZES, tiny_model

__all__ = [
    "UNSEEN",
    "Case",
    "lopsided_case",
    "lopsided_model",
    "origin_of",
    "random_windows",
    "weights_alone",
]

# The expert of `lopsided_case` that no token reaches.
UNSEEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, its units, the text it read, and what was recorded.

    Attributes:
        model: a live model.
        layout: its routed experts.
        windows: tokens, int64 [windows, length].
        evidence: what a calibration pass over `windows` recorded.
    """

    model: Any
    layout: Layout
    windows: Tensor
    evidence: Evidence


def origin_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return a provenance without measured floors, which differ a little from pass to pass."""
    kept = {name: value for name, value in provenance.items() if name != KEY}
    return {n: origin_of(x) if isinstance(x, Mapping) else x for n, x in kept.items()}


def random_windows(count: int = 6, *, seed: int = 0) -> Tensor:
    """Return random windows of 16 tokens that every tiny model knows, int64 [count, 16]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZES["vocab_size"], (count, 16), generator=generator)


def lopsided_model(family: str = "mixtral", *, experts: int = 5, **changes: Any) -> Any:
    """Return a tiny model whose last expert never sees a token.

    Of experts 0 and 1 one has a positive logit, and so has one of experts 2 and 3. The last
    expert's logit is 0, so it is never among the two largest.
    """
    model = tiny_model(family, num_local_experts=experts, num_experts=experts, **changes)
    with torch.no_grad():
        for layer in model.model.layers:
            router = layer.mlp.gate.weight
            router[1], router[3], router[-1] = -router[0], -router[2], 0
    return model


def lopsided_case(recorded: Recorded = PLAIN, *, windows: int = 6) -> Case:
    """Return a model whose last expert never sees a token, with what was recorded on a text."""
    model, text = lopsided_model(), random_windows(windows)
    layout = walk(model)
    evidence = calibrate(model, layout, text, recorded)
    return Case(model=model, layout=layout, windows=text, evidence=evidence)


def weights_alone(model: Any, include: Collection[str] = (), **provenance: Any) -> Evidence:
    """Return evidence that has a live model's weights and nothing of a text.

    Args:
        model: a live model.
        include: roles in addition to routed experts.
        provenance: what the evidence says of its origin.
    """
    layout = walk(model, include)
    tensors = dict(model.named_parameters())

    def weights(which: np.ndarray) -> Tensor:
        return read_units(layout, which, tensors).detach()

    return Evidence(
        layout=layout, layers={}, linears={}, weights=weights, replay=None, provenance=provenance
    )
