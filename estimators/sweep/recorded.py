"""What a calibration pass records in addition to routing and diagonal second moments."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from bitknap.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a pass records; each item costs memory, and the last two also time.

    Attributes:
        full: Whole second-moment matrices.
        curvature: Squared gradients, with labels drawn from the model.
        traces: The experts' inputs and routing, token by token.
        gradients: The loss's gradients at the experts' output, with labels drawn from the model;
            keeps traces too.
        streams: Every layer's output for the text, so that variants can start at any layer; only
            passes that go layer by layer keep it.
        trace_tokens: Number of first tokens to keep in traces; all when not given.
        spilled: Dtype of activations on disk between layers, in passes that go layer by layer;
            bfloat16 takes half the disk, and its rounding is measured as noise too.
    """

    full: bool = False
    curvature: bool = False
    traces: bool = False
    gradients: bool = False
    streams: bool = False
    trace_tokens: int | None = None
    spilled: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.trace_tokens is not None and self.trace_tokens < 1:
            raise InputError(
                f"trace_tokens: {self.trace_tokens} is below 1; leave it out to keep all"
            )

    @classmethod
    def of(cls, needs: Collection[str]) -> Recorded:
        """Return the recording that an estimator's needs require."""
        return cls(
            full="full" in needs,
            curvature="curvature" in needs,
            traces="traces" in needs,
            gradients="gradients" in needs,
            streams="kl" in needs,
        )

    @property
    def differentiates(self) -> bool:
        """Whether the pass needs gradients of the loss."""
        return self.curvature or self.gradients

    @property
    def keeps_streams(self) -> bool:
        """Whether a pass that goes layer by layer keeps every layer's output while it runs."""
        return self.streams or self.differentiates

    @property
    def by_layer(self) -> tuple[object, ...]:
        """The name of a layer-by-layer pass in a journal, in addition to model and text."""
        also = [name for name in ("streams", "curvature", "gradients") if getattr(self, name)]
        return self.spilled, self.full, self.traces, self.trace_tokens, *also

    def of_experts(self, tokens: int) -> dict[str, Any]:
        """Return the options of `recording` for a text of so many tokens."""
        traced = (self.trace_tokens or tokens) if self.traces or self.gradients else 0
        return {
            "full": self.full,
            "curvature": self.curvature,
            "trace_tokens": traced,
            "gradients": self.gradients,
        }
